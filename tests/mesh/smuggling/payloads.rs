//! The table of what is sent, made and not kept: ways to write a length, a coding, a line's end, a target or a host, in
//! every place where they can stand; and what each must come to.

use weft_harness::streams::{PREFACE, fields, frame};

/// What is sent, and what comes of it.
pub(super) struct Payload {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
    pub(super) h2: bool,
    pub(super) want: Want,
}

/// `method path body`, in order.
pub(super) type Requests = Vec<(String, String, Vec<u8>)>;

pub(super) enum Want {
    /// Nothing reaches the app.
    Refused,
    /// These reach it, and nothing else.
    Only(Requests),
}

/// What is hidden in most payloads; no app may ever see it.
const HIDDEN: &str = "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n";

/// The table. Paths are made unique by `{}`, which stands for the payload's number.
pub(super) fn payloads() -> Vec<Payload> {
    let mut table = Table::default();
    two_lengths(&mut table);
    codings(&mut table);
    lengths(&mut table);
    chunks(&mut table);
    lines(&mut table);
    targets(&mut table);
    hosts(&mut table);
    switches(&mut table);
    pairs(&mut table);
    old(&mut table);
    connection(&mut table);
    http2(&mut table);
    table.0
}

#[derive(Default)]
struct Table(Vec<Payload>);

impl Table {
    fn add(&mut self, name: impl Into<String>, bytes: impl AsRef<[u8]>, h2: bool, want: Want) {
        let number = self.0.len().to_string();
        let fill = |bytes: &[u8]| -> Vec<u8> {
            let mut out = Vec::new();
            let mut rest = bytes;
            while let Some(at) = rest.windows(2).position(|two| two == b"{}") {
                out.extend_from_slice(&rest[..at]);
                out.extend_from_slice(number.as_bytes());
                rest = &rest[at + 2..];
            }
            out.extend_from_slice(rest);
            out
        };
        let want = match want {
            Want::Refused => Want::Refused,
            Want::Only(requests) => Want::Only(
                requests
                    .into_iter()
                    .map(|(method, path, body)| (method, path.replace("{}", &number), body))
                    .collect(),
            ),
        };
        self.0.push(Payload { name: name.into(), bytes: fill(bytes.as_ref()), h2, want });
    }

    fn refused(&mut self, name: impl Into<String>, bytes: impl AsRef<[u8]>) {
        self.add(name, bytes, false, Want::Refused);
    }

    fn only(&mut self, name: impl Into<String>, bytes: impl AsRef<[u8]>, requests: &[(&str, &str, &str)]) {
        self.add(name, bytes, false, Want::Only(owned(requests)));
    }
}

fn owned(requests: &[(&str, &str, &str)]) -> Requests {
    let one = |&(method, path, body): &(&str, &str, &str)| (method.to_owned(), path.to_owned(), body.into());
    requests.iter().map(one).collect()
}

/// A POST to `/{}` with these fields and this body. Where a body needs a length of its own, the fields have it.
fn post(fields: &str, body: &str) -> String {
    let fields = if fields.is_empty() { String::new() } else { format!("{fields}\r\n") };
    format!("POST /p{{}} HTTP/1.1\r\nHost: a\r\n{fields}\r\n{body}")
}

/// A last request that ends the connection.
const LAST: &str = "GET /last{} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
const LAST_SEEN: (&str, &str, &str) = ("GET", "/last{}", "");

fn two_lengths(table: &mut Table) {
    let hidden = HIDDEN.len();
    for (name, length) in [("short", 4), ("zero", 0), ("right", 5 + hidden), ("long", 500)] {
        for (order, fields) in [
            ("CL.TE", format!("Content-Length: {length}\r\nTransfer-Encoding: chunked")),
            ("TE.CL", format!("Transfer-Encoding: chunked\r\nContent-Length: {length}")),
            ("CL, TE apart", format!("Content-Length: {length}\r\nx: y\r\nTransfer-Encoding: chunked")),
        ] {
            table.refused(format!("{order}, {name}"), post(&fields, &format!("0\r\n\r\n{HIDDEN}")));
        }
    }
}

fn codings(table: &mut Table) {
    let bad = [
        "Transfer-Encoding: xchunked",
        "Transfer-Encoding: chunkedx",
        "Transfer-Encoding: chunk",
        "Transfer-Encoding: identity",
        "Transfer-Encoding: gzip",
        "Transfer-Encoding: gzip, chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: identity, chunked",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: chunked;q=1",
        "Transfer-Encoding: ,chunked",
        "Transfer-Encoding: chunked,",
        "Transfer-Encoding: chunked chunked",
        "Transfer-Encoding: \"chunked\"",
        "Transfer-Encoding: 'chunked'",
        "Transfer-Encoding:",
        "Transfer-Encoding: \u{b}chunked",
        "Transfer-Encoding: \u{c}chunked",
        "Transfer-Encoding: \0chunked",
        "Transfer-Encoding: chunked\0",
        "Transfer-Encoding: chunked\u{a0}",
        "Transfer-Encoding: ch\u{fc}nked",
        "Transfer-Encoding: chun\tked",
        "Transfer-Encoding : chunked",
        "Transfer-Encoding\t: chunked",
        "Transfer-Encoding\u{b}: chunked",
        "Transfer-Encoding\0: chunked",
        "Transfer-Encoding\r\n : chunked",
        "Transfer-Encoding:\r\n chunked",
        "Transfer-Encoding:\r\n\tchunked",
        "Transfer-Encoding:\n chunked",
        "Transfer-Encoding: chunked\r\n x",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        "Transfer-Encoding: identity\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\ntransfer_encoding: x",
        "Transfer_Encoding: chunked",
        "Transfer Encoding: chunked",
        " Transfer-Encoding: chunked",
        "\tTransfer-Encoding: chunked",
        "x: y\r\n Transfer-Encoding: chunked",
        "x: y\nTransfer-Encoding: chunked",
        "x: y\rTransfer-Encoding: chunked",
        "x: y\r\r\nTransfer-Encoding: chunked",
        "x: y\0\r\nTransfer-Encoding: chunked",
        ":Transfer-Encoding: chunked",
        "Transfer-Encoding chunked",
        "Transfer-Encoding: chunked\n",
    ];
    for fields in bad {
        table.refused(format!("TE {fields:?}"), post(fields, &format!("0\r\n\r\n{HIDDEN}")));
    }
    for fields in ["Transfer_Encoding: chunked", "TRANSFER-ENCODING: chunked", "transfer-encoding:\tCHUNKED "]
    {
        // With a length beside it, no spelling is one too many.
        let both = format!("Content-Length: 4\r\n{fields}");
        table.refused(format!("CL and TE {fields:?}"), post(&both, &format!("0\r\n\r\n{HIDDEN}")));
    }
    for fields in ["Transfer-Encoding: chunked", "TRANSFER-ENCODING: chunked", "transfer-encoding:\tCHUNKED "]
    {
        let body = format!("5\r\nhello\r\n0\r\n\r\n{LAST}");
        table.only(format!("TE {fields:?}"), post(fields, &body), &[("POST", "/p{}", "hello"), LAST_SEEN]);
    }
}

fn lengths(table: &mut Table) {
    let bad = [
        "Content-Length: 5\r\nContent-Length: 5",
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: 0\r\nContent-Length: 44",
        "Content-Length: 44\r\ncontent_length: 0",
        "Content_Length: 44",
        "Content-Length: 5, 5",
        "Content-Length: 5,6",
        "Content-Length: ,5",
        "Content-Length: 5;",
        "Content-Length: +5",
        "Content-Length: -5",
        "Content-Length: 0x5",
        "Content-Length: 5.0",
        "Content-Length: 5e0",
        "Content-Length: 0_5",
        "Content-Length: 5 5",
        "Content-Length: 5\t6",
        "Content-Length: \"5\"",
        "Content-Length: five",
        "Content-Length: \u{b}5",
        "Content-Length: 5\0",
        "Content-Length: \u{665}",
        "Content-Length:",
        "Content-Length: ",
        "Content-Length: 18446744073709551616",
        "Content-Length: 18446744073709551621",
        "Content-Length: 99999999999999999999999999",
        "Content-Length : 5",
        "Content-Length\t: 5",
        " Content-Length: 5",
        "x: y\r\n Content-Length: 5",
        "Content-Length: 5\r\n 6",
        "Content-Length:\r\n 5",
        "x: y\nContent-Length: 5",
        "Content-Length: 5\nx: y",
        "Content Length: 5",
    ];
    for fields in bad {
        table.refused(format!("CL {fields:?}"), post(fields, &format!("hello{HIDDEN}")));
    }
    for fields in ["Content-Length: 5", "content-length:5", "CONTENT-LENGTH: \t5 \t"] {
        let body = format!("hello{LAST}");
        table.only(format!("CL {fields:?}"), post(fields, &body), &[("POST", "/p{}", "hello"), LAST_SEEN]);
    }
    // The body looks like a request, and is none.
    let fields = format!("Content-Length: {}", HIDDEN.len());
    let body = format!("{HIDDEN}{LAST}");
    table.only("a request as a body", post(&fields, &body), &[("POST", "/p{}", HIDDEN), LAST_SEEN]);
}

fn chunks(table: &mut Table) {
    let chunked = "Transfer-Encoding: chunked";
    let bad = [
        "5 \r\nhello\r\n0\r\n\r\n",
        " 5\r\nhello\r\n0\r\n\r\n",
        "\t5\r\nhello\r\n0\r\n\r\n",
        "0x5\r\nhello\r\n0\r\n\r\n",
        "+5\r\nhello\r\n0\r\n\r\n",
        "-5\r\nhello\r\n0\r\n\r\n",
        "5h\r\nhello\r\n0\r\n\r\n",
        "5_\r\nhello\r\n0\r\n\r\n",
        "5\0\r\nhello\r\n0\r\n\r\n",
        "\r\n5\r\nhello\r\n0\r\n\r\n",
        ";x\r\nhello\r\n0\r\n\r\n",
        "5\nhello\r\n0\r\n\r\n",
        "5\rhello\r\n0\r\n\r\n",
        "5\r\r\nhello\r\n0\r\n\r\n",
        "5;x\nhello\r\n0\r\n\r\n",
        "5;x\rhello\r\n0\r\n\r\n",
        "5;\n\r\nhello\r\n0\r\n\r\n",
        "5;x=\"\n\"\r\nhello\r\n0\r\n\r\n",
        "5;x\0\r\nhello\r\n0\r\n\r\n",
        "5 ;x\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello0\r\n\r\n",
        "5\r\nhello\n0\r\n\r\n",
        "5\r\nhello\r0\r\n\r\n",
        "5\r\nhelloXX0\r\n\r\n",
        "4\r\nhello\r\n0\r\n\r\n",
        "6\r\nhello\r\n0\r\n\r\n",
        "5\r\nhello\r\n0\n\r\n",
        "5\r\nhello\r\n0\r\n\n",
        "5\r\nhello\r\n0\r\nx\r\n\r\n",
        "5\r\nhello\r\n0\r\nContent-Length: 40\r\n\r\n",
        "5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
        "5\r\nhello\r\n0\r\nHost: b\r\n\r\n",
        "5\r\nhello\r\n0\r\n x: y\r\n\r\n",
        "5\r\nhello\r\n0\r\nx: y\nz: w\r\n\r\n",
        "00000000000000005\r\nhello\r\n0\r\n\r\n",
        "100000000000000005\r\nhello\r\n0\r\n\r\n",
        "ffffffffffffffff5\r\nhello\r\n0\r\n\r\n",
    ];
    for body in bad {
        table.refused(format!("chunk {body:?}"), post(chunked, &format!("{body}{HIDDEN}")));
    }
    for body in [
        "5\r\nhello\r\n0\r\n\r\n",
        "0005\r\nhello\r\n000\r\n\r\n",
        "5;x=y\r\nhello\r\n0;z\r\n\r\n",
        "5;x=\"\\\"y\"\r\nhello\r\n0\r\n\r\n",
        "1\r\nh\r\n4\r\nello\r\n0\r\nx-trailer: y\r\n\r\n",
    ] {
        let bytes = post(chunked, &format!("{body}{LAST}"));
        table.only(format!("chunk {body:?}"), bytes, &[("POST", "/p{}", "hello"), LAST_SEEN]);
    }
    let inner = format!("{:x}\r\n{HIDDEN}\r\n0\r\n\r\n{LAST}", HIDDEN.len());
    table.only("a request in a chunk", post(chunked, &inner), &[("POST", "/p{}", HIDDEN), LAST_SEEN]);
}

fn lines(table: &mut Table) {
    for (name, bytes) in [
        ("bare LF everywhere", "GET /p{} HTTP/1.1\nHost: a\n\n"),
        ("bare LF after the start line", "GET /p{} HTTP/1.1\nHost: a\r\n\r\n"),
        ("bare LF after a field", "GET /p{} HTTP/1.1\r\nHost: a\nx: y\r\n\r\n"),
        ("bare LF at the end", "GET /p{} HTTP/1.1\r\nHost: a\r\n\n"),
        ("bare LF and end", "GET /p{} HTTP/1.1\r\nHost: a\n\r\n"),
        ("bare CR after the start line", "GET /p{} HTTP/1.1\rHost: a\r\n\r\n"),
        ("bare CR in a value", "GET /p{} HTTP/1.1\r\nHost: a\r\nx: y\rGET /smuggled HTTP/1.1\r\n\r\n"),
        ("two CR", "GET /p{} HTTP/1.1\r\nHost: a\r\r\n\r\n"),
        ("CR CR LF at the end", "GET /p{} HTTP/1.1\r\nHost: a\r\n\r\r\n"),
        ("NUL in a value", "GET /p{} HTTP/1.1\r\nHost: a\r\nx: \0\r\n\r\n"),
        ("NUL in a name", "GET /p{} HTTP/1.1\r\nHost: a\r\nx\0: y\r\n\r\n"),
        ("DEL in a value", "GET /p{} HTTP/1.1\r\nHost: a\r\nx: \u{7f}\r\n\r\n"),
        ("a folded field", "GET /p{} HTTP/1.1\r\nHost: a\r\nx: y\r\n z\r\n\r\n"),
        ("a folded first field", "GET /p{} HTTP/1.1\r\n x: y\r\nHost: a\r\n\r\n"),
        ("a field without colon", "GET /p{} HTTP/1.1\r\nHost: a\r\nGET /smuggled HTTP/1.1\r\n\r\n"),
        ("a field without name", "GET /p{} HTTP/1.1\r\nHost: a\r\n: y\r\n\r\n"),
        ("a name with brackets", "GET /p{} HTTP/1.1\r\nHost: a\r\nx[y]: z\r\n\r\n"),
        ("a name with a letter outside ASCII", "GET /p{} HTTP/1.1\r\nHost: a\r\nx\u{e9}: z\r\n\r\n"),
        ("two empty lines first", "\r\n\r\nGET /p{} HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("a bare LF first", "\nGET /p{} HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("a space first", " GET /p{} HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("a NUL first", "\0GET /p{} HTTP/1.1\r\nHost: a\r\n\r\n"),
    ] {
        table.refused(name, format!("{bytes}{HIDDEN}"));
    }
    let early = format!("\r\nGET /p{{}} HTTP/1.1\r\nHost: a\r\n\r\n{LAST}");
    table.only("one empty line first", early, &[("GET", "/p{}", ""), LAST_SEEN]);
}

fn targets(table: &mut Table) {
    for (name, line) in [
        ("two spaces", "GET  /p{} HTTP/1.1"),
        ("a tab", "GET\t/p{} HTTP/1.1"),
        ("a tab before the version", "GET /p{}\tHTTP/1.1"),
        ("a space at the end", "GET /p{} HTTP/1.1 "),
        ("a space in the target", "GET /p{} x HTTP/1.1"),
        ("a request in the target", "GET /p{} HTTP/1.1 HTTP/1.1"),
        ("no version", "GET /p{}"),
        ("no target", "GET HTTP/1.1"),
        ("version 0.9", "GET /p{} HTTP/0.9"),
        ("version 1.2", "GET /p{} HTTP/1.2"),
        ("version 1.10", "GET /p{} HTTP/1.10"),
        ("version 2.0", "GET /p{} HTTP/2.0"),
        ("version 11", "GET /p{} HTTP/11"),
        ("a small version", "GET /p{} http/1.1"),
        ("a wide version", "GET /p{} HTTP/ 1.1"),
        ("a control in the target", "GET /p{}\u{1} HTTP/1.1"),
        ("a NUL in the target", "GET /p{}\0 HTTP/1.1"),
        ("a bare CR in the target", "GET /p{}\rx HTTP/1.1"),
        ("a bracket in the method", "G(T /p{} HTTP/1.1"),
        ("a colon in the method", "GET: /p{} HTTP/1.1"),
        ("no slash", "GET p{} HTTP/1.1"),
        ("the preface of HTTP/2", "PRI * HTTP/2.0"),
    ] {
        table.refused(name, format!("{line}\r\nHost: a\r\n\r\n{HIDDEN}"));
    }
    let absolute = format!("GET http://a/p{{}} HTTP/1.1\r\nHost: a\r\n\r\n{LAST}");
    table.only("absolute form", absolute, &[("GET", "/p{}", ""), LAST_SEEN]);
    let other = format!("GET http://b/p{{}} HTTP/1.1\r\nHost: a\r\n\r\n{LAST}");
    table.only("absolute form, another Host", other, &[("GET", "/p{}", ""), LAST_SEEN]);
}

fn hosts(table: &mut Table) {
    for (name, fields) in [
        ("none", "x: y"),
        ("two", "Host: a\r\nHost: b"),
        ("two alike", "Host: a\r\nHost: a"),
        ("two apart", "Host: a\r\nx: y\r\nhost: b"),
        ("with a space", "Host : a"),
        ("folded", "Host: a\r\n b"),
        ("with a slash", "Host: a/b"),
        ("with a space within", "Host: a b"),
        ("with user", "Host: u@a@b"),
        ("with a question mark", "Host: a?b"),
        ("with a port that is none", "Host: a:x"),
        ("a list", "Host: a, b"),
    ] {
        table.refused(format!("Host: {name}"), format!("GET /p{{}} HTTP/1.1\r\n{fields}\r\n\r\n{HIDDEN}"));
    }
}

fn switches(table: &mut Table) {
    table.refused(
        "CONNECT with a request behind",
        format!("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n{HIDDEN}"),
    );
    table.refused(
        "CONNECT with a length",
        "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\nContent-Length: 5\r\n\r\nhello",
    );
    for (name, fields) in [
        ("h2c", "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__"),
        ("h2c in a list", "Connection: Upgrade\r\nUpgrade: foo, h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__"),
        ("TLS", "Connection: Upgrade\r\nUpgrade: TLS/1.0"),
        ("not listed", "Upgrade: websocket"),
        ("websocket without a key", "Connection: Upgrade\r\nUpgrade: websocket"),
    ] {
        // Whoever declines an upgrade reads the next request; nothing may be taken for the other protocol before.
        let bytes = format!("GET /p{{}} HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n{LAST}");
        table.only(format!("upgrade declined: {name}"), bytes, &[("GET", "/p{}", ""), LAST_SEEN]);
        let bad =
            format!("GET /p{{}} HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\nGET /smuggled HTTP/1.1\nHost: a\n\n");
        table.only(format!("upgrade declined, malformed behind: {name}"), bad, &[("GET", "/p{}", "")]);
    }
}

fn pairs(table: &mut Table) {
    let get = "GET /p{} HTTP/1.1\r\nHost: a\r\n\r\n";
    table.only("two GET", format!("{get}{LAST}"), &[("GET", "/p{}", ""), LAST_SEEN]);
    let bad =
        "POST /q HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    table.only("a good one and a bad one", format!("{get}{bad}{HIDDEN}"), &[("GET", "/p{}", "")]);
    table.only(
        "the rest of a head",
        format!("{get}GET /q HTTP/1.1\r\nHost: a\r\nx: "),
        &[("GET", "/p{}", "")],
    );
    for method in ["GET", "OPTIONS", "DELETE", "PUT", "PATCH"] {
        let body = HIDDEN;
        let head = format!("{method} /p{{}} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        table.only(
            format!("{method} with a body"),
            format!("{head}{body}{LAST}"),
            &[(method, "/p{}", body), LAST_SEEN],
        );
        let head = format!("{method} /p{{}} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        table.only(
            format!("{method} with chunks"),
            format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n{LAST}", body.len()),
            &[(method, "/p{}", body), LAST_SEEN],
        );
        // CL.0: the app does not look at the body, and it must not become the next request.
        let head =
            format!("{method} /ignore{{}} HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
        let name = format!("{method} with a body that nobody reads");
        table.only(name, format!("{head}{body}{LAST}"), &[(method, "/ignore{}", ""), LAST_SEEN]);
        let head = format!("{method} /ignore{{}} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
        let body = format!("{:x}\r\n{body}\r\n0\r\n\r\n", body.len());
        let name = format!("{method} with chunks that nobody reads");
        table.only(name, format!("{head}{body}{LAST}"), &[(method, "/ignore{}", ""), LAST_SEEN]);
    }
    let head = "HEAD /p{} HTTP/1.1\r\nHost: a\r\n\r\n";
    table.only("HEAD and GET", format!("{head}{LAST}"), &[("HEAD", "/p{}", ""), LAST_SEEN]);
    let expect = post("Expect: 100-continue\r\nContent-Length: 5", &format!("hello{LAST}"));
    table.only("100-continue, not waited for", expect, &[("POST", "/p{}", "hello"), LAST_SEEN]);
    let close = "GET /p{} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n";
    table.only("behind Connection: close", format!("{close}{HIDDEN}"), &[("GET", "/p{}", "")]);
}

fn old(table: &mut Table) {
    table.refused("1.0 chunked", "POST /p{} HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n");
    let both = "POST /p{} HTTP/1.0\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    table.refused("1.0 chunked with a length", both);
    let none = format!("GET /p{{}} HTTP/1.0\r\n\r\n{HIDDEN}");
    table.only("1.0 without Host, something behind", none, &[("GET", "/p{}", "")]);
    let body = format!("POST /p{{}} HTTP/1.0\r\nHost: a\r\n\r\n{HIDDEN}");
    table.only("1.0 without a length, something behind", body, &[("POST", "/p{}", "")]);
    let keep = "POST /p{} HTTP/1.0\r\nHost: a\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello";
    let last = "GET /last{} HTTP/1.0\r\nHost: a\r\n\r\n";
    table.only("1.0 kept alive", format!("{keep}{last}"), &[("POST", "/p{}", "hello"), LAST_SEEN]);
}

fn connection(table: &mut Table) {
    for listed in [
        "Content-Length",
        "Host",
        "Transfer-Encoding",
        "traceparent",
        "x-forwarded-for",
        "close, Content-Length",
    ] {
        let fields = format!("Connection: keep-alive, {listed}\r\nContent-Length: 5");
        let last = if listed.starts_with("close") { HIDDEN } else { LAST };
        let seen: &[_] =
            if last == LAST { &[("POST", "/p{}", "hello"), LAST_SEEN] } else { &[("POST", "/p{}", "hello")] };
        table.only(format!("Connection lists {listed}"), post(&fields, &format!("hello{last}")), seen);
    }
    for fields in
        ["Keep-Alive: timeout=5", "Proxy-Connection: keep-alive", "TE: chunked", "Trailer: Content-Length"]
    {
        let bytes = post(&format!("{fields}\r\nContent-Length: 5"), &format!("hello{LAST}"));
        table.only(fields, bytes, &[("POST", "/p{}", "hello"), LAST_SEEN]);
    }
}

pub(super) const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn http2(table: &mut Table) {
    let whole = |head: &[(&str, &str)], body: &[&str], trailers: &[(&str, &str)]| {
        let mut out = PREFACE.to_vec();
        let last = if body.is_empty() && trailers.is_empty() { END_STREAM } else { 0 };
        out.extend(frame(1, END_HEADERS | last, 1, &fields(head)));
        for (n, data) in body.iter().enumerate() {
            let last = if n + 1 == body.len() && trailers.is_empty() { END_STREAM } else { 0 };
            out.extend(frame(0, last, 1, data.as_bytes()));
        }
        if !trailers.is_empty() {
            out.extend(frame(1, END_HEADERS | END_STREAM, 1, &fields(trailers)));
        }
        out
    };
    const PSEUDO: [(&str, &str); 4] =
        [(":method", "POST"), (":scheme", "http"), (":authority", "a"), (":path", "/p{}")];
    // The path has to keep its length, which stands before it: numbers are put in here, not later.
    let mut add =
        |name: &str, more: &[(&str, &str)], body: &[&str], trailers: &[(&str, &str)], seen: Option<&str>| {
            let number = table.0.len().to_string();
            let filled: Vec<_> =
                PSEUDO.iter().chain(more).map(|(n, v)| ((*n).to_owned(), v.replace("{}", &number))).collect();
            let mut head: Vec<(&str, &str)> = filled.iter().map(|(n, v)| (&**n, &**v)).collect();
            // A pseudo-field given alone takes the place of the usual one.
            let alone = more.iter().filter(|_| more.len() == 1);
            for (name, _) in alone.filter(|(name, _)| PSEUDO.iter().any(|(pseudo, _)| pseudo == name)) {
                let usual = head.iter().position(|(n, _)| n == name).unwrap();
                head.remove(usual);
                let given = head.iter().position(|(n, _)| n == name).unwrap();
                let given = head.remove(given);
                head.insert(usual, given);
            }
            head.retain(|(_, value)| *value != "(none)");
            let want = match seen {
                None => Want::Refused,
                Some(body) => Want::Only(owned(&[("POST", "/p{}", body)])),
            };
            table.add(format!("h2: {name}"), whole(&head, body, trailers), true, want);
        };
    add("plain", &[], &["hello"], &[], Some("hello"));
    add("right length", &[("content-length", "5")], &["he", "llo"], &[], Some("hello"));
    add("trailers", &[], &["hello"], &[("x-trailer", "y")], Some("hello"));
    add("te: trailers", &[("te", "trailers")], &["hello"], &[], Some("hello"));
    add("a request as a body", &[], &[HIDDEN], &[], Some(HIDDEN));
    for (name, more) in [
        ("CR LF in a value", ("x", "y\r\nTransfer-Encoding: chunked")),
        ("LF in a value", ("x", "y\nTransfer-Encoding: chunked")),
        ("CR in a value", ("x", "y\rz")),
        ("NUL in a value", ("x", "y\0z")),
        ("CR LF in a name", ("x: y\r\ntransfer-encoding", "chunked")),
        ("colon in a name", ("transfer-encoding: chunked", "x")),
        ("space in a name", ("x y", "z")),
        ("an empty name", ("", "z")),
        ("a name in upper case", ("Transfer-Encoding", "chunked")),
        ("transfer-encoding", ("transfer-encoding", "chunked")),
        ("connection", ("connection", "close")),
        ("keep-alive", ("keep-alive", "timeout=5")),
        ("proxy-connection", ("proxy-connection", "close")),
        ("upgrade", ("upgrade", "h2c")),
        ("te: gzip", ("te", "gzip")),
        ("CR LF in the path", (":path", "/p{} HTTP/1.1\r\nHost: b\r\n\r\nGET /smuggled")),
        ("space in the path", (":path", "/p{} HTTP/1.1")),
        ("tab in the path", (":path", "/p{}\tx")),
        ("NUL in the path", (":path", "/p{}\0")),
        ("a path without slash", (":path", "p{}")),
        ("an empty path", (":path", "")),
        ("no path", (":path", "(none)")),
        ("CR LF in the method", (":method", "GET /smuggled HTTP/1.1\r\nHost: b\r\n\r\nPOST")),
        ("space in the method", (":method", "POST /smuggled")),
        ("no method", (":method", "(none)")),
        ("CR LF in the authority", (":authority", "a\r\nx: y")),
        ("space in the authority", (":authority", "a b")),
        ("CR LF in the scheme", (":scheme", "http://b/\r\n")),
        ("an unknown pseudo-field", (":x", "y")),
        ("a length too short", ("content-length", "4")),
        ("a length too long", ("content-length", "6")),
        ("no length for a body", ("content-length", "0")),
        ("a length that is none", ("content-length", "5x")),
        ("a length with a sign", ("content-length", "+5")),
        ("a length for programs", ("content_length", "5")),
        ("a coding for programs", ("transfer_encoding", "chunked")),
        ("a list of lengths", ("content-length", "5, 5")),
    ] {
        add(name, &[more], &["hello"], &[], None);
    }
    add("two lengths", &[("content-length", "5"), ("content-length", "6")], &["hello"], &[], None);
    add("two lengths alike", &[("content-length", "5"), ("content-length", "5")], &["hello"], &[], None);
    add("two hosts", &[("host", "a"), ("host", "b")], &["hello"], &[], None);
    add("a pseudo-field behind", &[("x", "y"), (":path", "/smuggled")], &["hello"], &[], None);
    // Nobody looks there for what the message is: dropped, or carried as what it is.
    add("a pseudo-field in trailers", &[], &["hello"], &[(":path", "/smuggled")], Some("hello"));
    add("a length in trailers", &[], &["hello"], &[("content-length", "50")], Some("hello"));
    add("a coding in trailers", &[], &["hello"], &[("transfer-encoding", "chunked")], None);
    add("CR LF in trailers", &[], &["hello"], &[("x", "y\r\n\r\nGET /smuggled HTTP/1.1")], None);
}
