//! Which rules may be about a request, found without going through all of them.
//!
//! Why: a thousand rules took up to 150 µs to go through, several times what the whole request costs. A rule is filed
//! under what must be there for it to hold (one of its identities, one of its paths), and of several such things under
//! the one that the fewest rules share. A request is then looked up by what it has, and only the rules that were filed
//! there are asked, in their order and as ever. So the index cannot decide wrongly, it could only leave out a rule that
//! would have held; a property test in the module above compares it with the walk. What cannot be filed (anyone,
//! "not these") is always asked.

use std::{borrow::Cow, collections::HashMap, iter, net::IpAddr, ops::Deref};

use http::HeaderName;

use super::{
    Ask, Path, Peer, decoded,
    rule::{AuthzRule, HttpMatch, SourceMatch, StringMatch},
    without_dot,
};

/// The rules of one port, in their order, and the way to those that may be about a request.
#[derive(Clone, Debug, Default)]
pub struct AuthzRules {
    rules: Vec<AuthzRule>,
    index: Option<Box<Index>>,
}

impl AuthzRules {
    /// Makes the index, where one is worth it: whoever decides does this once. (Who only writes or compares a policy
    /// does not need it.)
    pub fn indexed(mut self) -> Self {
        let worth_it = self.rules.len() > FEW && self.rules.len() <= MOST;
        self.index = worth_it.then(|| Box::new(Index::new(&self.rules)));
        self
    }

    pub(super) fn index(&self) -> Option<&Index> {
        self.index.as_deref()
    }

    #[cfg(test)]
    pub(super) fn indexed_however_few(mut self) -> Self {
        self.index = Some(Box::new(Index::new(&self.rules)));
        self
    }
}

impl From<Vec<AuthzRule>> for AuthzRules {
    fn from(rules: Vec<AuthzRule>) -> Self {
        Self { rules, index: None }
    }
}

/// To read only: an index of rules that have changed would leave some out.
impl Deref for AuthzRules {
    type Target = [AuthzRule];

    fn deref(&self) -> &[AuthzRule] {
        &self.rules
    }
}

/// Made once for a policy.
#[derive(Clone, Debug)]
pub(super) struct Index {
    always: Found,
    /// Those filed under something of HTTP: all of them may be about a connection that is not understood.
    by_http: Found,
    identities: Texts,
    namespaces: Texts,
    /// By their bits.
    addresses: Texts,
    paths: Texts,
    /// In lower case.
    hosts: Texts,
    headers: HashMap<HeaderName, Texts>,
}

/// What of a request a text is compared with.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
enum Field<'a> {
    Identity,
    Namespace,
    Address,
    Path,
    Host,
    Header(&'a HeaderName),
}

type Key<'a> = (Field<'a>, Cow<'a, StringMatch>);

impl Index {
    fn new(rules: &[AuthzRule]) -> Self {
        let mut shared = HashMap::<Key<'_>, usize>::new();
        for rule in rules {
            let needs =
                rule.sources.iter().flat_map(source_needs).chain(rule.http.iter().flat_map(http_needs));
            for key in needs.flatten() {
                *shared.entry(key).or_default() += 1;
            }
        }
        let (mut always, mut by_http) = (Found::default(), Found::default());
        let mut filed = HashMap::<Field<'_>, Vec<(Cow<'_, StringMatch>, u16)>>::new();
        for (n, rule) in (0..).zip(rules) {
            let sources = rarest(rule.sources.iter().map(source_needs), &shared);
            let http = rarest(rule.http.iter().map(http_needs), &shared);
            let keys = match (sources, http) {
                (Some((a, _)), Some((b, http))) if b < a => Some((http, true)),
                (Some((_, sources)), _) => Some((sources, false)),
                (None, Some((_, http))) => Some((http, true)),
                (None, None) => None,
            };
            let Some((keys, is_http)) = keys else {
                always.insert(n);
                continue;
            };
            if is_http {
                by_http.insert(n);
            }
            for (field, want) in keys {
                filed.entry(field).or_default().push((want, n));
            }
        }
        let mut texts = |field| Texts::new(filed.remove(&field).unwrap_or_default(), field == Field::Host);
        let (identities, namespaces, addresses) =
            (texts(Field::Identity), texts(Field::Namespace), texts(Field::Address));
        let (paths, hosts) = (texts(Field::Path), texts(Field::Host));
        let headers = filed.into_iter().filter_map(|(field, filed)| match field {
            Field::Header(name) => Some((name.clone(), Texts::new(filed, false))),
            Field::Identity | Field::Namespace | Field::Address | Field::Path | Field::Host => None,
        });
        let headers = headers.collect();
        Self { always, by_http, identities, namespaces, addresses, paths, hosts, headers }
    }

    /// The rules that may have something to say; `None`: any may, since a rule that looks at this path refuses it.
    pub(super) fn find<'p>(&self, peer: &Peer<'_>, ask: &Ask<'p>, read: &mut Path<'p>) -> Option<Found> {
        let mut found = self.always;
        self.addresses.find(bits(peer.address.to_canonical()), &mut found);
        if let Some(id) = peer.identity {
            self.identities.find(id.as_str().bytes(), &mut found);
            self.namespaces.find(id.namespace().bytes(), &mut found);
        }
        let Ask::Http { method: _, host, path, headers } = *ask else {
            found.insert_all(&self.by_http);
            return Some(found);
        };
        if !self.paths.is_empty() {
            let decoded = decoded(read, path).ok()?;
            self.paths.find(decoded.iter().copied(), &mut found);
            if matches!(decoded, Cow::Owned(_)) {
                self.paths.find(path.bytes(), &mut found);
            }
        }
        self.hosts.find(without_dot(host).bytes().map(|b| b.to_ascii_lowercase()), &mut found);
        if !self.headers.is_empty() {
            for (name, value) in headers {
                if let Some(texts) = self.headers.get(name) {
                    texts.find(value.as_bytes().iter().copied(), &mut found);
                }
            }
        }
        Some(found)
    }
}

/// What must be there for a source to hold: one key of each list.
fn source_needs(source: &SourceMatch) -> Vec<Vec<Key<'_>>> {
    let one = |field, want: Option<_>| want.map(|want| vec![(field, Cow::Borrowed(want))]);
    let range = source.cidr.map(|cidr| {
        let bits: String =
            bits(cidr.addr()).take(1 + usize::from(cidr.prefix_len())).map(char::from).collect();
        vec![(Field::Address, Cow::Owned(StringMatch::Prefix(bits.into())))]
    });
    let needs = [
        one(Field::Identity, source.identity.as_ref()),
        one(Field::Namespace, source.namespace.as_ref()),
        range,
    ];
    needs.into_iter().flatten().filter(can_be_filed).collect()
}

/// What must be there for a match to hold: one key of each list.
fn http_needs(http: &HttpMatch) -> Vec<Vec<Key<'_>>> {
    fn any<'a>(field: Field<'a>, wants: &'a [StringMatch]) -> Option<Vec<Key<'a>>> {
        (!wants.is_empty()).then(|| wants.iter().map(|want| (field, Cow::Borrowed(want))).collect())
    }
    let headers = http.headers.iter().map(|(name, want)| vec![(Field::Header(name), Cow::Borrowed(want))]);
    let needs = [any(Field::Path, &http.paths), any(Field::Host, &http.hosts)];
    needs.into_iter().flatten().chain(headers).filter(can_be_filed).collect()
}

fn can_be_filed(keys: &Vec<Key<'_>>) -> bool {
    keys.iter().all(|(_, want)| **want != StringMatch::Present)
}

/// An address as a text that begins with each range that it is in.
fn bits(address: IpAddr) -> impl DoubleEndedIterator<Item = u8> + Clone {
    let (family, bits, len) = match address {
        IpAddr::V4(address) => (b'4', u128::from(u32::from(address)) << 96, 32),
        IpAddr::V6(address) => (b'6', u128::from(address), 128),
    };
    iter::once(family).chain((0..len).map(move |n| (bits >> (127 - n) & 1) as u8))
}

/// Keys of which one must be there for any of several matches to hold, and how many rules share them; `None`: it may
/// hold without.
fn rarest<'a>(
    any: impl Iterator<Item = Vec<Vec<Key<'a>>>>,
    shared: &HashMap<Key<'a>, usize>,
) -> Option<(usize, Vec<Key<'a>>)> {
    let sharing = |keys: &Vec<Key<'a>>| keys.iter().filter_map(|key| shared.get(key)).sum::<usize>();
    let each = any.map(|needs| needs.into_iter().min_by_key(sharing)).collect::<Option<Vec<_>>>()?;
    let keys = each.concat();
    (!keys.is_empty()).then(|| (sharing(&keys), keys))
}

/// Texts that stand for rules, found by a text that equals them, begins or ends with them.
#[derive(Clone, Debug, Default)]
struct Texts {
    forward: Vec<Text>,
    /// Read from the end, as what they are compared with.
    backward: Vec<Text>,
}

#[derive(Clone, Debug)]
struct Text {
    text: Box<[u8]>,
    /// Equal, or the beginning.
    whole: bool,
    rule: u16,
    /// One more than the place of the nearest before this that holds wherever this does; 0: none does.
    shorter: usize,
}

impl Texts {
    fn new(filed: Vec<(Cow<'_, StringMatch>, u16)>, fold: bool) -> Self {
        let mut texts = Self::default();
        for (want, rule) in filed {
            let (to, want, whole) = match &*want {
                StringMatch::Exact(want) => (&mut texts.forward, want, true),
                StringMatch::Prefix(want) => (&mut texts.forward, want, false),
                StringMatch::Suffix(want) => (&mut texts.backward, want, false),
                StringMatch::Present => continue,
            };
            let want = if fold { Cow::Owned(want.to_ascii_lowercase()) } else { Cow::Borrowed(&**want) };
            to.push(Text { text: want.as_bytes().into(), whole, rule, shorter: 0 });
        }
        for text in &mut texts.backward {
            text.text.reverse();
        }
        sort(&mut texts.forward);
        sort(&mut texts.backward);
        texts
    }

    fn is_empty(&self) -> bool {
        self.forward.is_empty() && self.backward.is_empty()
    }

    fn find(&self, text: impl DoubleEndedIterator<Item = u8> + Clone, found: &mut Found) {
        find(&self.forward, text.clone(), found);
        find(&self.backward, text.rev(), found);
    }
}

/// In the order of bytes all that a text begins with stands before it, and between the two stands only what begins with
/// that, too: the last that is not after a text leads to all that hold of it, each to the next shorter one.
fn sort(texts: &mut [Text]) {
    texts.sort_unstable_by(|a, b| a.text.cmp(&b.text));
    let mut beginnings = Vec::<usize>::new();
    for n in 0..texts.len() {
        let text = &texts[n].text;
        while let Some(last) = beginnings.last()
            && !texts[*last].holds(text.iter().copied())
        {
            beginnings.pop();
        }
        texts[n].shorter = beginnings.last().map_or(0, |last| last + 1);
        beginnings.push(n);
    }
}

fn find(texts: &[Text], text: impl Iterator<Item = u8> + Clone, found: &mut Found) {
    let mut next = texts.partition_point(|known| known.text.iter().copied().le(text.clone()));
    while let Some(known) = next.checked_sub(1).and_then(|place| texts.get(place)) {
        if known.holds(text.clone()) {
            found.insert(known.rule);
        }
        next = known.shorter;
    }
}

impl Text {
    fn holds(&self, mut text: impl Iterator<Item = u8>) -> bool {
        self.text.iter().all(|want| text.next() == Some(*want)) && (!self.whole || text.next().is_none())
    }
}

/// A set of rules by their places, on the stack.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found([u64; MOST / 64]);

impl Default for Found {
    fn default() -> Self {
        Self([0; MOST / 64])
    }
}

impl Found {
    fn insert(&mut self, rule: u16) {
        if let Some(word) = self.0.get_mut(usize::from(rule) / 64) {
            *word |= 1 << (rule % 64);
        }
    }

    fn insert_all(&mut self, other: &Self) {
        for (word, more) in self.0.iter_mut().zip(&other.0) {
            *word |= more;
        }
    }

    /// In their order.
    pub(super) fn of<'a>(&self, rules: &'a AuthzRules) -> impl Iterator<Item = &'a AuthzRule> + Clone {
        let words = self.0.iter().copied().zip(rules.chunks(64));
        words.flat_map(|(word, rules)| {
            let mut left = word;
            iter::from_fn(move || {
                let place = left.trailing_zeros() as usize;
                left &= left.wrapping_sub(1);
                rules.get(place)
            })
        })
    }
}

/// Up to here going through them is as quick.
const FEW: usize = 16;
/// What the wire takes (`proto`'s `convert/authz.rs`); more are gone through.
const MOST: usize = 4_096;
