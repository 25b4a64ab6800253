//! What a path means to whoever reads it: an app, a policy, a proxy.
//!
//! Why this stands alone: authorization compares one canonical form and refuses the rest, routing asks whether any
//! reading would have chosen another rule. Both must read a path in the same way.

use std::{borrow::Cow, iter};

/// Why a path may mean different things to a policy and to an app.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotCanonical {
    /// Neither `*` nor a path from `/` on.
    #[error("path does not start with /")]
    NotAbsolute,
    /// `//`.
    #[error("path has an empty segment")]
    EmptySegment,
    /// `.` or `..`.
    #[error("path has a . or .. segment")]
    DotSegment,
    /// `\`, `;`, `#`, a control or a character outside ASCII.
    #[error("path has the character {0:?}")]
    Character(char),
    /// An escape for something that could be written plainly, that separates, or that hides another escape.
    #[error("path escapes the byte {0:#04x}")]
    Escape(u8),
    /// `%` without two hexadecimal digits.
    #[error("path has a broken escape")]
    BrokenEscape,
}

/// Whether a path means the same to everybody who reads it.
///
/// # Errors
/// Why not. An app, a policy and a proxy that decode in different orders would disagree about it.
pub fn canonical_path(path: &str) -> Result<(), NotCanonical> {
    if path == "*" {
        return Ok(());
    }
    let Some(rest) = path.strip_prefix('/') else {
        return Err(NotCanonical::NotAbsolute);
    };
    let mut segments = rest.split('/').peekable();
    while let Some(segment) = segments.next() {
        match segment {
            "" if segments.peek().is_some() => return Err(NotCanonical::EmptySegment),
            "." | ".." => return Err(NotCanonical::DotSegment),
            _ => {}
        }
    }
    let mut bytes = path.bytes();
    while let Some(b) = bytes.next() {
        match b {
            b'%' => {
                let mut digit = || bytes.next().and_then(|b| char::from(b).to_digit(16));
                let (Some(high), Some(low)) = (digit(), digit()) else {
                    return Err(NotCanonical::BrokenEscape);
                };
                let escaped = (high * 16 + low) as u8;
                if is_hidden(escaped) {
                    return Err(NotCanonical::Escape(escaped));
                }
            }
            b'\\' | b';' | b'#' | b'?' | 0..=b' ' | 0x7f => {
                return Err(NotCanonical::Character(char::from(b)));
            }
            0x80.. => {
                let odd = path.chars().find(|c| !c.is_ascii());
                return Err(NotCanonical::Character(odd.unwrap_or(char::REPLACEMENT_CHARACTER)));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Unreserved characters need no escape, `/ \ ; %` and controls must not arrive by one. Escapes of
/// the rest (space, `@`, letters outside ASCII) are what ordinary clients send.
fn is_hidden(b: u8) -> bool {
    b.is_ascii_alphanumeric() || b.is_ascii_control() || b"-._~/\\;%".contains(&b)
}

/// How often an app may decode a path, at most. Each time costs as much as the path is long.
const DECODED_TIMES: usize = 4;

/// What apps make of a path: escapes decoded once or until there are none, those of `/` too or not, parameters (`;x`)
/// left or dropped, `\\` taken for `/`, empty and dot segments resolved, the end at a NUL. `None`: there are escapes in
/// escapes in escapes, and what they hide is not looked for.
pub(crate) fn readings(path: &str) -> Option<impl Iterator<Item = String>> {
    let decoded = |slashes: bool| {
        let kept =
            if slashes { path.to_owned() } else { path.replace("%2f", "%252f").replace("%2F", "%252F") };
        String::from_utf8_lossy(&percent_decode(&kept)).into_owned()
    };
    let mut whole = path.to_owned();
    for times in 0.. {
        let next = String::from_utf8_lossy(&percent_decode(&whole)).into_owned();
        if next == whole {
            break;
        }
        if times == DECODED_TIMES {
            return None;
        }
        whole = next;
    }
    let texts = [path.to_owned(), decoded(false), decoded(true), whole];
    Some(texts.into_iter().flat_map(|text| [resolved(&text, false), resolved(&text, true)]))
}

/// A path without empty and dot segments, and without parameters if they are to be dropped.
fn resolved(path: &str, drop_parameters: bool) -> String {
    let path = path.split('\0').next().unwrap_or_default();
    let mut out: Vec<&str> = Vec::new();
    for segment in path.split(['/', '\\']) {
        let plain = segment.split(';').next().unwrap_or_default();
        match if drop_parameters { plain } else { segment } {
            "" | "." => {}
            ".." => {
                out.pop();
            }
            segment => out.push(segment),
        }
    }
    let folder = path.ends_with(['/', '\\']) && !out.is_empty();
    format!("/{}{}", out.join("/"), if folder { "/" } else { "" })
}

/// Decodes `%XX`; what is not an escape stays as it is. `+` stays `+`.
pub(crate) fn percent_decode(text: &str) -> Cow<'_, [u8]> {
    if text.as_bytes().contains(&b'%') {
        Cow::Owned(decoded(text).collect())
    } else {
        Cow::Borrowed(text.as_bytes())
    }
}

/// Whether it is `want` when decoded; what makes no copy of it.
pub(crate) fn decodes_to(text: &str, want: &[u8]) -> bool {
    decoded(text).eq(want.iter().copied())
}

fn decoded(text: &str) -> impl Iterator<Item = u8> {
    let mut rest = text.as_bytes();
    iter::from_fn(move || {
        let [first, after @ ..] = rest else { return None };
        let escape = match (first, after) {
            (b'%', [high, low, ..]) => hex(*high).zip(hex(*low)),
            _ => None,
        };
        let (byte, used) = escape.map_or((*first, 1), |(high, low)| (high * 16 + low, 3));
        rest = &rest[used..];
        Some(byte)
    })
}

fn hex(b: u8) -> Option<u8> {
    char::from(b).to_digit(16).map(|d| d as u8)
}

pub(crate) fn ends_with_ignore_case(text: &str, suffix: &str) -> bool {
    let (text, suffix) = (text.as_bytes(), suffix.as_bytes());
    text.len() >= suffix.len() && text[text.len() - suffix.len()..].eq_ignore_ascii_case(suffix)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_odd_in_a_path_is_named() {
        let odd = |path| canonical_path(path).unwrap_err();
        assert_eq!(odd("/aä"), NotCanonical::Character('ä'));
        assert_eq!(odd("/a;b"), NotCanonical::Character(';'));
        assert_eq!(odd("/%61"), NotCanonical::Escape(b'a'));
        assert_eq!(odd("/%5C"), NotCanonical::Escape(b'\\'));
        assert_eq!(odd("/%1f"), NotCanonical::Escape(0x1f));
        assert_eq!(odd("/%4"), NotCanonical::BrokenEscape);
        assert_eq!(odd("/a//b"), NotCanonical::EmptySegment);
        assert_eq!(odd("/a/.."), NotCanonical::DotSegment);
        assert_eq!(odd("a"), NotCanonical::NotAbsolute);
        for good in
            ["/", "*", "/a/", "/a%20b", "/users/a%40b.com", "/caf%C3%A9", "/a@b:c,d=e&f+g!h$i(j)'*~_-."]
        {
            assert_eq!(canonical_path(good), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn what_apps_make_of_a_path() {
        let read = |path| {
            readings(path).unwrap().collect::<std::collections::BTreeSet<_>>().into_iter().collect::<Vec<_>>()
        };
        for plain in ["/", "/a", "/a/", "/a/b", "/a%zz", "/a%4"] {
            assert_eq!(read(plain), [plain]);
        }
        for nothing_left in ["//", "/..", "/../", "/./", "/a/..", "/a/../", "\\"] {
            assert_eq!(read(nothing_left), ["/"], "{nothing_left}");
        }
        assert_eq!(read("/x/../a//./b\\"), ["/a/b/"]);
        assert_eq!(read("/a;x/b"), ["/a/b", "/a;x/b"], "parameters dropped or not");
        assert_eq!(read("/a%2Fb%2fc"), ["/a%2Fb%2fc", "/a/b/c"], "a slash or its escape");
        assert_eq!(read("/%2561"), ["/%2561", "/%61", "/a"], "decoded once or until there are none");
        assert_eq!(read("/a%00/b"), ["/a", "/a%00/b"], "the end at a NUL");
        let deep = |times: usize| format!("/%{}61", "25".repeat(times));
        assert_eq!(read(&deep(3)).last().unwrap(), "/a");
        assert!(readings(&deep(4)).is_none() && readings(&deep(30_000)).is_none());
    }

    #[test]
    fn a_name_is_compared_as_it_decodes() {
        assert!(decodes_to("%61+b%", b"a+b%") && decodes_to("", b""));
        assert!(!decodes_to("%61b", b"%61b") && !decodes_to("ab", b"a") && !decodes_to("a", b"ab"));
    }

    proptest! {
        #[test]
        fn any_path_is_handled(path in any::<String>()) {
            let _ = canonical_path(&path);
        }
    }
}
