//! Heads of requests and responses as they cross a hop.
//!
//! Why a form of our own between two requests: one request may be sent several times, to a sidecar (HTTP/2,
//! absolute), to an HTTP/1.1 app (origin form and `Host`) or as an upgrade, and each attempt is built from the
//! same parts. Private headers (`weft-*`) are ours alone: what an app sends under that prefix is removed.

use std::time::Duration;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version, header,
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::Body;
use hyper::{body::Incoming, ext::Protocol};
use weft_core::{
    framing::{Why, is_read_as, respelt},
    route::RequestHead,
};

use crate::{error::Error, expect::WEFT_EXPECT, peer::Peer};

/// The app's HTTP version, and whether its target was in absolute form, for the far end to restore; absent: HTTP/2.
const WEFT_HTTP: HeaderName = HeaderName::from_static("weft-http");
/// Ends the value of [`WEFT_HTTP`] where the target was in absolute form.
const ABSOLUTE: &[u8] = b" absolute";
/// Which attempt this is, from the second on; the app is told as well.
pub(crate) const WEFT_ATTEMPT: HeaderName = HeaderName::from_static("weft-attempt");
/// On an answer to an upgrade that the app did not take up: its real status. HTTP/2 gives a 2xx answer to CONNECT a
/// meaning of its own (RFC 9113 §8.5), so such an answer crosses under another status.
pub(crate) const WEFT_STATUS: HeaderName = HeaderName::from_static("weft-status");
/// To the app: who calls.
pub(crate) const WEFT_CLIENT_ID: HeaderName = HeaderName::from_static("weft-client-id");
/// Set when missing, kept when there.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
/// Goes with an offer of `h2c`.
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Whether a name is ours alone, also as apps read it that take other characters for `-` (CGI, WSGI, Rack: `_`; lighttpd:
/// whatever is no letter or digit): `weft-`, and where a caller comes from in a spelling that no sidecar writes.
fn is_private(name: &str) -> bool {
    match name.as_bytes() {
        [b'w', b'e', b'f', b't', next, ..] => !next.is_ascii_alphanumeric(),
        [b'x', ..] => is_read_as(name.as_bytes(), b"x-forwarded-for") && name != "x-forwarded-for",
        _ => false,
    }
}

/// A request to be sent on, once or more often.
#[derive(Clone)]
pub(crate) struct Outgoing {
    pub(crate) method: Method,
    pub(crate) authority: Option<Authority>,
    pub(crate) path: PathAndQuery,
    /// Without `Host` and without what belongs to one connection.
    pub(crate) headers: HeaderMap,
    /// The app's.
    pub(crate) version: Version,
    /// The target's scheme where it stood in absolute form, as requests to forward proxies do.
    absolute: Option<Scheme>,
    /// Set when the app asks for another protocol (WebSocket).
    pub(crate) upgrade: Option<Upgrade>,
    /// The body waits to be asked for; whoever holds it back says so.
    pub(crate) expects: bool,
    /// What the app is told of its caller. Not among `headers`: these are what is authorized, also when it is asked again.
    from: Option<Provenance>,
}

/// Who sent a request, for its app.
#[derive(Clone)]
pub(crate) struct Provenance {
    pub(crate) address: HeaderValue,
    /// By its certificate, if it has shown one.
    pub(crate) id: Option<HeaderValue>,
}

/// A change of protocol.
#[derive(Clone)]
pub(crate) struct Upgrade {
    pub(crate) protocol: HeaderValue,
}

impl Outgoing {
    /// Takes a request apart. Private headers are removed; only from a sidecar (`mesh`) are they believed, and what
    /// is not read here was read by the caller of this function.
    pub(crate) fn take(request: Request<Incoming>, mesh: bool) -> Result<(Self, Incoming), Error> {
        let version = app_version(&request, mesh);
        let (mut parts, body) = request.into_parts();
        let told = if mesh { parts.headers.get(WEFT_HTTP) } else { None };
        let absolute = match told {
            Some(form) => form.as_bytes().ends_with(ABSOLUTE),
            None => version != Version::HTTP_2 && parts.uri.scheme().is_some(),
        };
        let extended = parts.extensions.remove::<Protocol>();
        let upgrade = match extended {
            Some(protocol) if !is_protocol(protocol.as_str().as_bytes()) => {
                return Err(Error::ConnectNotAllowed);
            }
            Some(protocol) => {
                let protocol =
                    HeaderValue::from_str(protocol.as_str()).map_err(|_| Error::Upgrade("its name"))?;
                Some(Upgrade { protocol })
            }
            None if parts.method == Method::CONNECT => return Err(Error::ConnectNotAllowed),
            None if parts.version != Version::HTTP_2 => asked_upgrade(&parts.method, &parts.headers),
            None => None,
        };
        remove_connection_headers(&mut parts.headers);
        if parts.headers.get_all(header::HOST).iter().nth(1).is_some() {
            return Err(Error::BadTarget);
        }
        if parts.version == Version::HTTP_2
            && (parts.headers.get_all(header::CONTENT_LENGTH).iter().nth(1).is_some()
                || parts.headers.keys().any(|name| respelt(name.as_ref()).is_some()))
        {
            // The library compares the body with the first of them only; HTTP/1 was followed before it was read.
            return Err(Error::Malformed(Why::ContentLength));
        }
        if version == Version::HTTP_2 && !mesh {
            join_cookies(&mut parts.headers);
        }
        let uri = parts.uri.into_parts();
        let authority = match uri.authority {
            // `GET name HTTP/1.1`: the library takes a path without its slash for an authority, and an app may not.
            Some(_) if uri.scheme.is_none() => return Err(Error::BadTarget),
            Some(authority) => Some(authority),
            None => match parts.headers.get(header::HOST) {
                // Without a copy: a header's value shares its bytes.
                Some(host) if !host.is_empty() => {
                    Some(Authority::try_from(host.as_bytes()).map_err(|_| Error::BadTarget)?)
                }
                _ => None,
            },
        };
        if authority.as_ref().is_some_and(|authority| !is_host(authority)) {
            return Err(Error::BadTarget);
        }
        parts.headers.remove(header::HOST);
        let path = uri.path_and_query.unwrap_or_else(|| PathAndQuery::from_static("/"));
        if path == "*" && parts.method != Method::OPTIONS {
            return Err(Error::BadTarget);
        }
        let outgoing = Self {
            method: parts.method,
            authority,
            path,
            headers: parts.headers,
            version,
            absolute: uri.scheme.filter(|_| absolute),
            upgrade,
            expects: false,
            from: None,
        };
        Ok((outgoing, body))
    }

    /// Says whom its app is to be told of, and takes away what others say of that: Envoy's header, which no sidecar writes
    /// and an app may believe.
    pub(crate) fn comes_from(&mut self, from: Provenance) {
        let claims = |name: &HeaderName| is_read_as(name.as_ref(), b"x-forwarded-client-cert");
        remove_those(&mut self.headers, claims);
        self.from = Some(from);
    }

    /// The host without its port, for matching.
    pub(crate) fn host(&self) -> &str {
        self.authority.as_ref().map_or("", host_of)
    }

    /// What decides its rule.
    pub(crate) fn head(&self) -> RequestHead<'_> {
        RequestHead {
            method: &self.method,
            host: self.host(),
            path: self.path.path(),
            query: self.path.query(),
            headers: &self.headers,
        }
    }

    /// The request of one attempt.
    pub(crate) fn request<B: Body>(&self, peer: &Peer, body: B, attempt: u32) -> Result<Request<B>, Error> {
        let mut request = Request::new(body);
        let mut headers = self.headers.clone();
        if matches!(peer, Peer::Mesh { .. }) {
            let form = match (self.version, &self.absolute) {
                (Version::HTTP_2, _) => None,
                (Version::HTTP_10, None) => Some("1.0"),
                (Version::HTTP_10, Some(_)) => Some("1.0 absolute"),
                (_, None) => Some("1.1"),
                (_, Some(_)) => Some("1.1 absolute"),
            };
            if let Some(form) = form {
                headers.insert(WEFT_HTTP, HeaderValue::from_static(form));
            }
            if self.expects {
                headers.insert(WEFT_EXPECT, HeaderValue::from_static("1"));
            }
        }
        if let Some(from) = &self.from {
            headers.append(X_FORWARDED_FOR, from.address.clone());
            if let Some(id) = &from.id {
                headers.insert(WEFT_CLIENT_ID, id.clone());
            }
        }
        if attempt > 1 {
            headers.insert(WEFT_ATTEMPT, HeaderValue::from(attempt));
        }
        if peer.is_h2() {
            let mut uri = http::uri::Parts::default();
            uri.scheme = Some(self.absolute.clone().unwrap_or(Scheme::HTTP));
            uri.path_and_query = Some(self.path.clone());
            uri.authority = Some(match &self.authority {
                Some(authority) => authority.clone(),
                // HTTP/1.0 without Host: an address is the only name there is.
                None => Authority::try_from(peer.address().to_string()).map_err(|_| Error::BadTarget)?,
            });
            *request.uri_mut() = Uri::from_parts(uri).map_err(|_| Error::BadTarget)?;
            *request.version_mut() = Version::HTTP_2;
            *request.method_mut() = self.method.clone();
            if let Some(upgrade) = &self.upgrade {
                *request.method_mut() = Method::CONNECT;
                let protocol = upgrade.protocol.to_str().map_err(|_| Error::Upgrade("its name"))?;
                request.extensions_mut().insert(Protocol::from(protocol));
            }
        } else {
            *request.uri_mut() = match (&self.absolute, &self.authority) {
                (Some(scheme), Some(authority)) => {
                    let mut uri = http::uri::Parts::default();
                    uri.scheme = Some(scheme.clone());
                    uri.authority = Some(authority.clone());
                    uri.path_and_query = Some(self.path.clone());
                    Uri::from_parts(uri).map_err(|_| Error::BadTarget)?
                }
                _ => Uri::from(self.path.clone()),
            };
            *request.method_mut() = match &self.upgrade {
                // Between sidecars an upgrade is an extended CONNECT; to an app it is a GET again.
                Some(_) => Method::GET,
                None => self.method.clone(),
            };
            let host = match &self.authority {
                Some(authority) => HeaderValue::from_str(authority.as_str()),
                // HTTP/1.0 without Host: an address is the only name there is.
                None => HeaderValue::from_str(&peer.address().to_string()),
            };
            headers.insert(header::HOST, host.map_err(|_| Error::BadTarget)?);
            if let Some(upgrade) = &self.upgrade {
                headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
                headers.insert(header::UPGRADE, upgrade.protocol.clone());
            } else if matches!(*request.method(), Method::GET | Method::HEAD)
                && !request.body().is_end_stream()
                && !headers.contains_key(header::CONTENT_LENGTH)
            {
                // Unless it is told so, the library takes it that these have no body.
                headers.insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        }
        *request.headers_mut() = headers;
        Ok(request)
    }
}

/// The host without its port. Nearly always it is what stands before the first colon, or all; the library looks for
/// users first.
fn host_of(authority: &Authority) -> &str {
    let text = authority.as_str();
    match text.bytes().position(|byte| matches!(byte, b':' | b'@' | b'[')) {
        None => text,
        Some(at) if text[at..].strip_prefix(':').is_some_and(is_digits) => &text[..at],
        Some(_) => authority.host(),
    }
}

/// A host and perhaps a port. The library also takes users, and ports that are none.
fn is_host(authority: &Authority) -> bool {
    let rest = authority.as_str().strip_prefix(host_of(authority));
    rest.is_some_and(|rest| {
        let port = rest.strip_prefix(':');
        rest.is_empty() || port.is_some_and(|port| port.len() <= 5 && is_digits(port))
    })
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The HTTP version that the app spoke, or is to see: the caller's app's. Only a sidecar is believed about it.
pub(crate) fn app_version<B>(request: &Request<B>, mesh: bool) -> Version {
    let told = if mesh { request.headers().get(WEFT_HTTP) } else { None };
    match told {
        Some(form) => match form.as_bytes().get(..3) {
            Some(b"1.0") => Version::HTTP_10,
            _ => Version::HTTP_11,
        },
        None => request.version(),
    }
}

/// One `cookie` line of the crumbs that HTTP/2 clients make of it (RFC 9113 §8.2.3): what matches headers must see it
/// whole.
fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(header::COOKIE).iter();
    if let (Some(first), Some(_)) = (crumbs.next(), crumbs.next()) {
        let mut whole = first.as_bytes().to_vec();
        for crumb in headers.get_all(header::COOKIE).iter().skip(1) {
            whole.extend_from_slice(b"; ");
            whole.extend_from_slice(crumb.as_bytes());
        }
        // Joined from values, with a separator that may stand in one.
        if let Ok(whole) = HeaderValue::from_bytes(&whole) {
            headers.insert(header::COOKIE, whole);
        }
    }
}

/// How long the sender of an HTTP/1.1 answer keeps its connection open for the next request, if it says so.
pub(crate) fn keep_alive_timeout(headers: &HeaderMap) -> Option<Duration> {
    let parameters = headers.get(KEEP_ALIVE)?.to_str().ok()?;
    let seconds = parameters.split(',').find_map(|p| p.trim().strip_prefix("timeout=")?.trim().parse().ok());
    seconds.map(Duration::from_secs)
}

/// An HTTP/1.1 `GET` that asks to switch to another protocol. What is not to be asked of an app is left out, as RFC 9110
/// §7.8 lets a recipient do: many clients offer `h2c` with every request.
fn asked_upgrade(method: &Method, headers: &HeaderMap) -> Option<Upgrade> {
    let asked = headers.get(header::UPGRADE)?;
    let listed = headers.get_all(header::CONNECTION).iter().any(|value| {
        let tokens = value.to_str().unwrap_or("");
        tokens.split(',').any(|t| t.trim().eq_ignore_ascii_case("upgrade"))
    });
    let usable = listed && *method == Method::GET && is_protocol(asked.as_bytes());
    usable.then(|| Upgrade { protocol: asked.clone() })
}

/// Whether an app may be asked to go on in this protocol: it has one name, perhaps a version (`SPDY/3.1`), and does not
/// carry requests, which nobody would authorize then (`h2c`, `TLS/1.3`, `HTTP/2.0`).
fn is_protocol(asked: &[u8]) -> bool {
    let is_token =
        asked.iter().all(|&byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(&byte));
    let starts =
        |with: &str| asked.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with.as_bytes()));
    is_token && !asked.is_empty() && !["h2", "h3", "http", "tls"].into_iter().any(starts)
}

/// Says of an answer over HTTP/1 that its connection ends with it.
pub(crate) fn closes<B>(response: &mut Response<B>) {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
}

/// Removes what belongs to one connection (RFC 9110 §7.6.1) and what is ours alone (`weft-*`).
pub(crate) fn remove_connection_headers(headers: &mut HeaderMap) {
    // One look at each name: to search for those that are seldom there costs more than all the rest of this.
    let (mut private, mut connection, mut hop, mut te) = (false, false, false, false);
    for name in headers.keys() {
        match name.as_str() {
            "connection" => connection = true,
            "te" => te = true,
            "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade" | "http2-settings" => {
                hop = true
            }
            other => private |= is_private(other),
        }
    }
    if private {
        remove_those(headers, |name| is_private(name.as_str()));
    }
    if connection {
        let listed: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            // What nearly all say, and no field is called.
            .filter(|token| !["keep-alive", "close"].iter().any(|usual| token.eq_ignore_ascii_case(usual)))
            .filter_map(|token| HeaderName::try_from(token.trim()).ok())
            .collect();
        for name in listed {
            // What a message is and where it goes cannot be taken away by naming it.
            if ![header::HOST, header::CONTENT_LENGTH, header::TE].contains(&name) {
                headers.remove(name);
            }
        }
        headers.remove(header::CONNECTION);
    }
    if hop {
        for name in [KEEP_ALIVE, PROXY_CONNECTION, HTTP2_SETTINGS, header::TRANSFER_ENCODING, header::UPGRADE]
        {
            headers.remove(name);
        }
    }
    if te
        && let Some(te) = headers.get(header::TE)
        && !te.as_bytes().eq_ignore_ascii_case(b"trailers")
    {
        let trailers =
            te.to_str().is_ok_and(|te| te.split(',').any(|t| t.trim().eq_ignore_ascii_case("trailers")));
        headers.remove(header::TE);
        if trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
        }
    }
}

/// Removes from trailers what only a head may say (RFC 9110 §6.5.1), and what is ours alone: some apps read both alike.
pub(crate) fn clean_trailers(trailers: &mut HeaderMap) {
    remove_those(trailers, |name| OF_A_HEAD.contains(name) || is_private(name.as_str()));
}

fn remove_those(headers: &mut HeaderMap, unwanted: impl Fn(&HeaderName) -> bool) {
    // One by one: there are hardly ever more than two, and then a list of them would cost more than looking again.
    while let Some(name) = headers.keys().find(|name| unwanted(name)).cloned() {
        headers.remove(name);
    }
}

/// Hides the status of an answer that declines an upgrade, for the way between sidecars.
pub(crate) fn hide_status(response: &mut http::response::Parts) {
    response.headers.insert(WEFT_STATUS, HeaderValue::from(response.status.as_u16()));
    response.status = StatusCode::NOT_IMPLEMENTED;
}

/// Whether there is any header that is ours alone: most answers have none, and each is searched for otherwise.
pub(crate) fn has_private(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| is_private(name.as_str()))
}

/// Takes back what [`hide_status`] did; whether it did.
pub(crate) fn restore_status<B>(response: &mut Response<B>) -> bool {
    let real = response.headers_mut().remove(WEFT_STATUS);
    let real = real.and_then(|status| StatusCode::from_bytes(status.as_bytes()).ok());
    if let Some(real) = real {
        *response.status_mut() = real;
    }
    real.is_some()
}

/// Makes `x-request-id` and `traceparent` (W3C Trace Context, not sampled) where they are missing.
pub(crate) fn identify(headers: &mut HeaderMap, rng: &mut impl rand::RngCore) {
    let [has_id, has_trace] = mark_unique(headers);
    if has_id && has_trace {
        return;
    }
    // 00-<32 digits of trace>-<16 digits of parent>-00; the request id is the trace id.
    let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
    let mut random = [0; 24];
    rng.fill_bytes(&mut random);
    random[15] |= 1; // all zero is not a trace id, nor a parent id
    random[23] |= 1;
    for (n, byte) in random.iter().enumerate() {
        let at = if n < 16 { 3 + 2 * n } else { 36 + 2 * (n - 16) };
        text[at] = HEX[usize::from(byte >> 4)];
        text[at + 1] = HEX[usize::from(byte & 15)];
    }
    if !has_id && let Ok(mut id) = HeaderValue::from_bytes(&text[3..35]) {
        id.set_sensitive(true);
        headers.insert(X_REQUEST_ID, id);
    }
    if !has_trace && let Ok(mut trace) = HeaderValue::from_bytes(&text) {
        trace.set_sensitive(true);
        headers.insert(TRACEPARENT, trace);
    }
}

/// Keeps what differs in each request out of HPACK's tables, where it would only push out what does not, and where the
/// encoder compares each new value with all those before it. Whether `x-request-id` and `traceparent` are there.
pub(crate) fn mark_unique(headers: &mut HeaderMap) -> [bool; 2] {
    set_unique(headers, true)
}

/// For the first request of a connection: names that stand in the table once are not spelled out any more.
pub(crate) fn unmark_unique(headers: &mut HeaderMap) {
    set_unique(headers, false);
}

fn set_unique(headers: &mut HeaderMap, unique: bool) -> [bool; 2] {
    [X_REQUEST_ID, TRACEPARENT].map(|name| match headers.get_mut(name) {
        Some(value) => {
            value.set_sensitive(unique);
            true
        }
        None => false,
    })
}

/// How long a gRPC caller waits: `grpc-timeout`, at most eight digits and a unit (gRPC over HTTP/2).
pub(crate) fn grpc_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let n: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(n * 3_600),
        "M" => Duration::from_secs(n * 60),
        "S" => Duration::from_secs(n),
        "m" => Duration::from_millis(n),
        "u" => Duration::from_micros(n),
        "n" => Duration::from_nanos(n),
        _ => return None,
    })
}

/// The answer that tells an HTTP/1.1 app that the protocol is switched.
pub(crate) fn switching<B>(response: &mut Response<B>, upgrade: &Upgrade) {
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = response.headers_mut();
    headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(header::UPGRADE, upgrade.protocol.clone());
}

/// How a message is framed, where it goes and how it is carried.
const OF_A_HEAD: [HeaderName; 10] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    X_FORWARDED_FOR,
];

const HEX: &[u8; 16] = b"0123456789abcdef";

#[cfg(test)]
mod tests {
    use rand::SeedableRng as _;

    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pair = |&(n, v): &(&'static str, &'static str)| {
            (HeaderName::from_static(n), HeaderValue::from_static(v))
        };
        pairs.iter().map(pair).collect()
    }

    #[test]
    fn the_host_is_the_librarys_and_users_and_ports_that_are_none_are_no_host() {
        for (text, good) in [
            ("a", true),
            ("a.b-c:80", true),
            ("10.96.0.10:8080", true),
            ("[::1]", true),
            ("[fd00::1]:8080", true),
            ("a:", true),
            ("a:123456", false),
            ("a:8x", false),
            ("user@a", false),
            ("user@80", false),
            ("user:80@a", false),
            ("user:80@80", false),
            ("80@a:80", false),
        ] {
            let Ok(authority) = Authority::try_from(text) else {
                assert!(!good, "{text}");
                continue;
            };
            assert_eq!(host_of(&authority), authority.host(), "{text}");
            assert_eq!(is_host(&authority), good, "{text}");
        }
    }

    #[test]
    fn what_is_unique_is_marked_and_kept() {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        let mut h = headers(&[("x-request-id", "mine")]);
        identify(&mut h, &mut rng);
        assert_eq!(h[X_REQUEST_ID], "mine");
        assert!(h[X_REQUEST_ID].is_sensitive() && h[TRACEPARENT].is_sensitive());
    }

    #[test]
    fn what_belongs_to_one_connection_goes_and_te_trailers_stays() {
        let mut h = headers(&[
            ("connection", "close, x-mine, host"),
            ("x-mine", "1"),
            ("host", "a"),
            ("keep-alive", "timeout=5"),
            ("transfer-encoding", "chunked"),
            ("te", "gzip, trailers"),
            ("upgrade", "h2c"),
            ("weft-client-id", "spiffe://spoofed"),
            ("x-kept", "1"),
        ]);
        remove_connection_headers(&mut h);
        assert_eq!(h, headers(&[("host", "a"), ("te", "trailers"), ("x-kept", "1")]));
    }

    #[test]
    fn trailers_say_nothing_that_a_head_must_say() {
        let mut h = headers(&[
            ("x-sum", "1"),
            ("content-length", "3"),
            ("host", "b"),
            ("transfer-encoding", "chunked"),
            ("weft-client-id", "spiffe://spoofed"),
            ("grpc-status", "0"),
        ]);
        clean_trailers(&mut h);
        assert_eq!(h, headers(&[("x-sum", "1"), ("grpc-status", "0")]));
    }

    #[test]
    fn ids_are_made_when_missing_and_kept_when_there() {
        let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
        let mut made = HeaderMap::new();
        identify(&mut made, &mut rng);
        let trace = made[TRACEPARENT].to_str().unwrap();
        assert_eq!(trace.len(), 55);
        assert_eq!(&trace[3..35], made[X_REQUEST_ID].to_str().unwrap());
        let mut kept = headers(&[("x-request-id", "mine"), ("traceparent", "theirs")]);
        identify(&mut kept, &mut rng);
        assert_eq!(kept, headers(&[("x-request-id", "mine"), ("traceparent", "theirs")]));
    }

    #[test]
    fn only_a_get_that_lists_upgrade_asks_for_one() {
        let h = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(asked_upgrade(&Method::GET, &h).is_some());
        assert!(asked_upgrade(&Method::POST, &h).is_none());
        let h = headers(&[("connection", "keep-alive"), ("upgrade", "websocket")]);
        assert!(asked_upgrade(&Method::GET, &h).is_none());
        for offer in ["h2c", "TLS/1.2"] {
            let h = headers(&[("connection", "upgrade"), ("upgrade", offer)]);
            assert!(asked_upgrade(&Method::GET, &h).is_none());
        }
    }

    #[test]
    fn grpc_timeouts_are_read_and_nonsense_is_not() {
        let read = |text: &'static str| grpc_timeout(&headers(&[("grpc-timeout", text)]));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("2H"), Some(Duration::from_secs(7_200)));
        assert_eq!(read("99999999n"), Some(Duration::from_nanos(99_999_999)));
        for nonsense in ["", "m", "1", "999999999S", "-1S", "1x", "1 S"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn cookie_crumbs_become_one_line() {
        let mut h = headers(&[("cookie", "a=1"), ("x", "y"), ("cookie", "b=2"), ("cookie", "c=3")]);
        join_cookies(&mut h);
        assert_eq!(h, headers(&[("cookie", "a=1; b=2; c=3"), ("x", "y")]));
    }

    #[test]
    fn keep_alive_timeouts_are_read_and_nonsense_is_not() {
        let read = |text: &'static str| keep_alive_timeout(&headers(&[("keep-alive", text)]));
        assert_eq!(read("timeout=5"), Some(Duration::from_secs(5)));
        assert_eq!(read("max=100, timeout=15"), Some(Duration::from_secs(15)));
        for nonsense in ["", "timeout", "timeout=", "timeout=-1", "max=3"] {
            assert_eq!(read(nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn an_app_is_told_of_its_caller_and_what_was_authorized_stays_as_it_was() {
        let outgoing = Outgoing {
            method: Method::GET,
            authority: None,
            path: PathAndQuery::from_static("/"),
            headers: headers(&[("x-forwarded-for", "198.51.100.1")]),
            version: Version::HTTP_11,
            absolute: None,
            upgrade: None,
            expects: false,
            from: Some(Provenance {
                address: HeaderValue::from_static("10.0.0.1"),
                id: Some(HeaderValue::from_static("spiffe://cluster.local/ns/shop/sa/a")),
            }),
        };
        let peer = Peer::App { address: "10.0.0.2:80".parse().unwrap(), h2: false };
        let request = outgoing.request(&peer, String::new(), 1).unwrap();
        let all: Vec<_> = request.headers().get_all("x-forwarded-for").iter().collect();
        assert_eq!(all, ["198.51.100.1", "10.0.0.1"]);
        assert_eq!(request.headers()["weft-client-id"], "spiffe://cluster.local/ns/shop/sa/a");
        assert_eq!(outgoing.headers, headers(&[("x-forwarded-for", "198.51.100.1")]));
    }

    #[test]
    fn an_app_is_asked_for_protocols_of_one_name_that_carry_no_requests() {
        for good in ["websocket", "WebSocket", "SPDY/3.1", "tcp", "derp"] {
            assert!(is_protocol(good.as_bytes()), "{good}");
        }
        for bad in [
            "", "h2c", "H2C", "h2c-14", "h2", "TLS/1.3", "tls", "HTTP/2.0", "http/1.1", "foo, h2c", "foo h2c",
        ] {
            assert!(!is_protocol(bad.as_bytes()), "{bad}");
        }
        assert!(!is_protocol(b"h2c\xa0") && !is_protocol(b"\xa0h2c"), "spaces to Python");
    }

    #[test]
    fn who_calls_cannot_be_said_in_another_spelling() {
        let mut h = headers(&[
            ("weft_client_id", "spiffe://cluster.local/ns/shop/sa/admin"),
            ("weft-client_id", "spiffe://cluster.local/ns/shop/sa/admin"),
            ("weft.client.id", "spiffe://cluster.local/ns/shop/sa/admin"),
            ("x_forwarded_for", "10.0.0.9"),
            ("x.forwarded.for", "10.0.0.9"),
            ("weftage", "mine"),
            ("x-forwarded-for", "198.51.100.1"),
        ]);
        assert!(has_private(&h));
        remove_connection_headers(&mut h);
        assert_eq!(h, headers(&[("weftage", "mine"), ("x-forwarded-for", "198.51.100.1")]));
        let mut trailers =
            headers(&[("weft_client_id", "a"), ("x-forwarded-for", "10.0.0.9"), ("x-sum", "1")]);
        clean_trailers(&mut trailers);
        assert_eq!(trailers, headers(&[("x-sum", "1")]));
    }
}
