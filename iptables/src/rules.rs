//! The rules as text: pure, one family at a time.
//!
//! Every decision here is made once per connection, on its first packet; the kernel remembers the
//! answer. Only TCP is captured.
//!
//! # What reaches the pod (`PREROUTING` → `WEFT_INBOUND`)
//! Everything addressed to the pod goes to the inbound listener, but for excluded ports and the proxy's
//! own. *Addressed to the pod* is asked of the kernel (`--dst-type LOCAL`): what is merely routed through
//! (a container inside the pod, a neighbour that forges a destination) is not an inbound connection, and
//! redirecting it would make the inbound listener an open relay. Nothing that arrives on `lo` is inbound:
//! it was decided upon in `OUTPUT`. The proxy's own ports are left alone rather than captured: a connection
//! straight to a capture port then has that very port as its original destination, and the proxy refuses
//! destinations that are its own listeners.
//!
//! # What leaves the pod (`OUTPUT` → `WEFT_OUTBOUND`)
//! In order, first match wins:
//! 1. **The proxy itself** (by uid, or gid) goes to `WEFT_PROXY`, see below.
//! 2. **Anything that the kernel routes over `lo`** is left alone: 127/8, `::1`, *and the pod's own
//!    addresses*. An app that dials `localhost` or its own pod IP finds itself, as without a mesh.
//! 3. Excluded interfaces, ports and networks are left alone. So are IPv6 link-local destinations: they
//!    mean nothing without an interface, and the original destination does not carry one. Inbound they
//!    *are* captured: nothing reaches an app by a side door.
//! 4. Everything else (or what the only-lists name) goes to the outbound listener.
//!
//! # What the proxy itself dials (`WEFT_PROXY`)
//! Most of it leaves the pod and must not be captured again. Two cases stay inside, over `lo`:
//! - **The self-call.** An app calls its own Service; outbound picks the endpoint that happens to be this
//!   pod and dials `podIP:port` with mTLS, as it would any other. That must reach *inbound* as if it came
//!   from outside, or TLS would be spoken to an app that expects none. So: proxy, over `lo`, to an address
//!   that is not loopback → inbound, under the same port exclusions as the outside (an excluded port is
//!   never dialled with mTLS: its endpoint carries no tunnel).
//! - **The last hop.** Inbound dials the app at its original address, also `podIP:port` over `lo`, also as
//!   the proxy. That must *not* be captured, or it would go round for ever. What tells the two apart is the
//!   source: inbound binds 127.0.0.6 (IPv6: `::6` where it was added to `lo`, else `::1`), and the kernel
//!   never chooses such a source by itself for a destination that is not loopback.
//!
//! An app gains nothing by binding these sources: the rules ask for them only of the proxy's uid.
//!
//! # Form
//! Rules are written as `iptables-save` prints them, so that what stands can be compared with what should.

use std::collections::BTreeMap;
use std::fmt::{Display, Write as _};

use crate::config::{Config, Family, NetFilter, PortFilter, PortRange};

/// All rules of one family, before they meet a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ruleset {
    chains: Vec<Chain>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Chain {
    name: &'static str,
    why: &'static str,
    rules: Vec<String>,
}

/// What a `nat` table holds, as `iptables-save` printed it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Present {
    chains: BTreeMap<String, Vec<String>>,
}

/// The text that captures, for an empty table: what `--dry-run` shows.
pub fn render(config: &Config, family: Family) -> String {
    Ruleset::new(config, family).install(&Present::default())
}

impl Ruleset {
    /// The rules that `config` asks for.
    pub fn new(config: &Config, family: Family) -> Self {
        Self {
            chains: vec![
                Chain { name: INBOUND, why: "what reaches the pod", rules: inbound(config) },
                Chain {
                    name: TO_INBOUND,
                    why: "to the inbound listener, but for these ports",
                    rules: to_inbound(config),
                },
                Chain { name: OUTBOUND, why: "what leaves the pod", rules: outbound(config, family) },
                Chain {
                    name: TO_OUTBOUND,
                    why: "to the outbound listener",
                    rules: redirect(&config.outbound, config.own.outbound),
                },
                Chain {
                    name: PROXY,
                    why: "what the proxy dials: only a call to its own pod is captured, its last hop to the app is not",
                    rules: proxy(family),
                },
            ],
        }
    }

    /// One transaction after which the table holds exactly these rules of ours, whatever it held before.
    pub fn install(&self, present: &Present) -> String {
        let mut text = String::from("*nat\n");
        // Declaring a chain makes it, or empties it.
        for chain in &self.chains {
            line(&mut text, format_args!(":{} - [0:0]", chain.name));
        }
        present.remove_jumps(&mut text);
        let stale: Vec<&str> =
            present.ours().filter(|name| self.chains.iter().all(|chain| chain.name != *name)).collect();
        remove_chains(&mut text, &stale);
        for chain in &self.chains {
            line(&mut text, format_args!("# {}: {}", chain.name, chain.why));
            for rule in &chain.rules {
                line(&mut text, format_args!("-A {} {rule}", chain.name));
            }
        }
        // First in line: a rule of somebody else that accepts must not be a way around the proxy.
        for (builtin, rule) in JUMPS {
            line(&mut text, format_args!("-I {builtin} 1 {rule}"));
        }
        text.push_str("COMMIT\n");
        text
    }

    /// Whether exactly these rules stand.
    pub fn is_installed(&self, present: &Present) -> bool {
        self.stands(present, |chain, rules| chain.rules == *rules)
    }

    /// Whether rules of this shape stand: every chain with its number of rules, every jump once. For
    /// versions of iptables that print a rule otherwise than we write it.
    pub fn looks_installed(&self, present: &Present) -> bool {
        self.stands(present, |chain, rules| chain.rules.len() == rules.len())
    }

    fn stands(&self, present: &Present, same: impl Fn(&Chain, &Vec<String>) -> bool) -> bool {
        present.ours().count() == self.chains.len()
            && self
                .chains
                .iter()
                .all(|chain| present.chains.get(chain.name).is_some_and(|rules| same(chain, rules)))
            && present.jumps().count() == JUMPS.len()
            && JUMPS.iter().all(|(builtin, rule)| {
                present
                    .chains
                    .get(*builtin)
                    .and_then(|rules| rules.first())
                    .is_some_and(|first| first == rule)
            })
    }
}

impl Present {
    /// Reads the `nat` table from what `iptables-save` printed.
    pub fn parse(saved: &str) -> Self {
        let mut chains: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut in_nat = false;
        for line in saved.lines() {
            if let Some(table) = line.strip_prefix('*') {
                in_nat = table.trim() == "nat";
            } else if !in_nat {
                continue;
            } else if let Some(chain) = line.strip_prefix(':') {
                if let Some(name) = chain.split_whitespace().next() {
                    chains.entry(name.to_owned()).or_default();
                }
            } else if let Some((name, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' '))
            {
                chains.entry(name.to_owned()).or_default().push(rule.trim_end().to_owned());
            }
        }
        Self { chains }
    }

    /// Whether anything of ours stands.
    pub fn has_ours(&self) -> bool {
        self.ours().next().is_some() || self.jumps().next().is_some()
    }

    /// Whether any rule stands, ours or not.
    pub fn has_rules(&self) -> bool {
        self.chains.values().any(|rules| !rules.is_empty())
    }

    /// One transaction that removes what is ours and nothing else; `None` where nothing is.
    pub fn removal(&self) -> Option<String> {
        if !self.has_ours() {
            return None;
        }
        let mut text = String::from("*nat\n");
        self.remove_jumps(&mut text);
        remove_chains(&mut text, &self.ours().collect::<Vec<_>>());
        text.push_str("COMMIT\n");
        Some(text)
    }

    fn ours(&self) -> impl Iterator<Item = &str> {
        self.chains.keys().map(String::as_str).filter(|name| name.starts_with(PREFIX))
    }

    /// Rules outside of our chains that lead into them.
    fn jumps(&self) -> impl Iterator<Item = (&str, &str)> {
        self.chains
            .iter()
            .filter(|(chain, _)| !chain.starts_with(PREFIX))
            .flat_map(|(chain, rules)| rules.iter().map(move |rule| (chain.as_str(), rule.as_str())))
            .filter(|(_, rule)| leads_to_us(rule))
    }

    fn remove_jumps(&self, text: &mut String) {
        for (chain, rule) in self.jumps() {
            line(text, format_args!("-D {chain} {rule}"));
        }
    }
}

fn inbound(config: &Config) -> Vec<String> {
    let mut rules = vec!["-i lo -j RETURN".to_owned()];
    rules.extend(config.interfaces.iter().map(|name| format!("-i {name} -j RETURN")));
    rules.push("-m addrtype ! --dst-type LOCAL -j RETURN".to_owned());
    rules.push(format!("-j {TO_INBOUND}"));
    rules
}

fn to_inbound(config: &Config) -> Vec<String> {
    let own = config.own.named().map(|(_, port)| format!("-p tcp -m tcp --dport {port} -j RETURN"));
    own.into_iter().chain(redirect(&config.inbound, config.own.inbound)).collect()
}

fn outbound(config: &Config, family: Family) -> Vec<String> {
    let mut rules = Vec::new();
    // A goto: what leaves WEFT_PROXY without an answer is not asked the questions below.
    rules.extend(config.proxy_uids.iter().map(|uid| format!("-m owner --uid-owner {uid} -g {PROXY}")));
    rules.extend(config.proxy_gids.iter().map(|gid| format!("-m owner --gid-owner {gid} -g {PROXY}")));
    rules.push("-o lo -j RETURN".to_owned());
    rules.push(format!("-d {} -j RETURN", loopback(family)));
    rules.extend(config.interfaces.iter().map(|name| format!("-o {name} -j RETURN")));
    match family {
        Family::Ipv4 => networks(&mut rules, &config.outbound_v4, config.only_networks),
        Family::Ipv6 => {
            rules.push("-d fe80::/10 -j RETURN".to_owned());
            networks(&mut rules, &config.outbound_v6, config.only_networks);
        }
    }
    rules
}

fn networks<N: Display>(rules: &mut Vec<String>, filter: &NetFilter<N>, only: bool) {
    rules.extend(filter.exclude.iter().map(|net| format!("-d {net} -j RETURN")));
    if only {
        rules.extend(filter.only.iter().map(|net| format!("-d {net} -j {TO_OUTBOUND}")));
    } else {
        rules.push(format!("-j {TO_OUTBOUND}"));
    }
}

fn proxy(family: Family) -> Vec<String> {
    let mut rules = vec!["! -o lo -j RETURN".to_owned(), format!("-d {} -j RETURN", loopback(family))];
    let sources: &[&str] = match family {
        Family::Ipv4 => &["127.0.0.6/32"],
        Family::Ipv6 => &["::6/128", "::1/128"],
    };
    rules.extend(sources.iter().map(|source| format!("-s {source} -j RETURN")));
    rules.push(format!("-j {TO_INBOUND}"));
    rules
}

fn redirect(filter: &PortFilter, listener: u16) -> Vec<String> {
    let port = |range: &PortRange| format!("-p tcp -m tcp --dport {}", range.dport());
    let mut rules: Vec<String> =
        filter.exclude.iter().map(|range| format!("{} -j RETURN", port(range))).collect();
    if filter.only.is_empty() {
        rules.push(format!("-p tcp -j REDIRECT --to-ports {listener}"));
    }
    rules
        .extend(filter.only.iter().map(|range| format!("{} -j REDIRECT --to-ports {listener}", port(range))));
    rules
}

fn loopback(family: Family) -> &'static str {
    match family {
        Family::Ipv4 => "127.0.0.0/8",
        Family::Ipv6 => "::1/128",
    }
}

fn leads_to_us(rule: &str) -> bool {
    let mut words = rule.split_whitespace().rev();
    let target = words.next();
    let verb = words.next();
    matches!(verb, Some("-j" | "-g" | "--jump" | "--goto"))
        && target.is_some_and(|name| name.starts_with(PREFIX))
}

/// All are emptied before any is deleted: one may lead to another.
fn remove_chains(text: &mut String, names: &[&str]) {
    for name in names {
        line(text, format_args!("-F {name}"));
    }
    for name in names {
        line(text, format_args!("-X {name}"));
    }
}

fn line(text: &mut String, args: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = text.write_fmt(args);
    text.push('\n');
}

const PREFIX: &str = "WEFT_";
const INBOUND: &str = "WEFT_INBOUND";
const TO_INBOUND: &str = "WEFT_TO_INBOUND";
const OUTBOUND: &str = "WEFT_OUTBOUND";
const TO_OUTBOUND: &str = "WEFT_TO_OUTBOUND";
const PROXY: &str = "WEFT_PROXY";

/// The only rules of ours outside of our chains.
const JUMPS: [(&str, &str); 2] =
    [("PREROUTING", "-p tcp -j WEFT_INBOUND"), ("OUTPUT", "-p tcp -j WEFT_OUTBOUND")];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Options;

    fn default_rules() -> Ruleset {
        Ruleset::new(&Options::default().validate().unwrap(), Family::Ipv4)
    }

    /// The table after a transaction, for the commands that this module writes.
    fn applied(text: &str, before: &Present) -> Present {
        let mut after = before.clone();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let words: Vec<&str> = line.split(' ').collect();
            let rule = |from: usize| words[from..].join(" ");
            match words[0] {
                "-A" => after.chains.entry(words[1].into()).or_default().push(rule(2)),
                "-I" => after.chains.entry(words[1].into()).or_default().insert(0, rule(3)),
                "-D" => {
                    let rules = after.chains.get_mut(words[1]).unwrap();
                    let at = rules.iter().position(|r| *r == rule(2)).expect("a rule to delete");
                    rules.remove(at);
                }
                "-F" => after.chains.get_mut(words[1]).unwrap().clear(),
                "-X" => {
                    assert!(after.chains.remove(words[1]).unwrap().is_empty(), "chain not empty");
                    let target = format!(" {}", words[1]);
                    assert!(after.chains.values().flatten().all(|r| !r.ends_with(&target)), "chain in use");
                }
                declared if declared.starts_with(':') => {
                    after.chains.insert(declared[1..].into(), vec![]);
                }
                _ => assert!(matches!(line, "*nat" | "COMMIT"), "unexpected {line}"),
            }
        }
        after
    }

    fn empty() -> Present {
        Present::parse("*nat\n:PREROUTING ACCEPT [0:0]\n:INPUT ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\nCOMMIT\n")
    }

    const FOREIGN: &str = "*filter\n:WEFT_NOT_NAT - [0:0]\nCOMMIT\n*nat\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
        :CNI-DNAT - [0:0]\n-A PREROUTING -m comment --comment \"to -j WEFT_X or so\" -j CNI-DNAT\n\
        -A OUTPUT -p udp -m udp --dport 53 -j CNI-DNAT\nCOMMIT\n";

    #[test]
    fn a_second_run_changes_nothing() {
        let rules = default_rules();
        let once = applied(&rules.install(&empty()), &empty());
        assert!(rules.is_installed(&once) && rules.looks_installed(&once));
        assert_eq!(applied(&rules.install(&once), &once), once);
    }

    #[test]
    fn removal_leaves_what_was_there_before() {
        let before = Present::parse(FOREIGN);
        let installed = applied(&default_rules().install(&before), &before);
        assert!(installed.has_ours());
        assert_eq!(applied(&installed.removal().unwrap(), &installed), before);
        assert!(!before.has_ours() && before.removal().is_none(), "what others own is not ours");
        assert!(Present::default().removal().is_none());
    }

    #[test]
    fn other_rules_keep_their_order_and_ours_come_first() {
        let before = Present::parse(FOREIGN);
        let after = applied(&default_rules().install(&before), &before);
        assert_eq!(after.chains["OUTPUT"][0], "-p tcp -j WEFT_OUTBOUND");
        assert_eq!(after.chains["OUTPUT"][1..], before.chains["OUTPUT"][..]);
        assert_eq!(after.chains["PREROUTING"][1..], before.chains["PREROUTING"][..]);
    }

    #[test]
    fn leftovers_of_any_kind_end_in_the_same_state() {
        let rules = default_rules();
        let want = applied(&rules.install(&empty()), &empty());
        let other = Ruleset::new(
            &Options { exclude_outbound_ports: vec!["25".into()], ..Options::default() }.validate().unwrap(),
            Family::Ipv4,
        );
        let mut doubled = want.clone();
        doubled.chains.get_mut("OUTPUT").unwrap().push("-p tcp -j WEFT_OUTBOUND".into());
        let mut stale = want.clone();
        stale.chains.insert("WEFT_OLD".into(), vec!["-j WEFT_OLDER".into()]);
        stale.chains.insert("WEFT_OLDER".into(), vec!["-j WEFT_PROXY".into()]);
        stale.chains.get_mut("PREROUTING").unwrap().push("-g WEFT_OLD".into());
        let mut cut = want.clone();
        cut.chains.get_mut("PREROUTING").unwrap().clear();
        cut.chains.get_mut("WEFT_PROXY").unwrap().pop();
        let changed = applied(&other.install(&empty()), &empty());
        for before in [doubled, stale, cut, changed] {
            assert!(!rules.is_installed(&before));
            assert_eq!(applied(&rules.install(&before), &before), want);
            assert_eq!(applied(&before.removal().unwrap(), &before), empty());
        }
    }

    #[test]
    fn both_directions_end_in_a_redirect_and_owner_is_asked_only_on_the_way_out() {
        // The kernel refuses `owner` in a chain that PREROUTING can reach.
        let rules = default_rules();
        for chain in &rules.chains {
            let owner = chain.rules.iter().any(|rule| rule.contains("--uid-owner"));
            assert_eq!(owner, chain.name == OUTBOUND, "{}", chain.name);
        }
    }
}
