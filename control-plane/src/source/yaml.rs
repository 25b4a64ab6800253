//! Text → objects, document by document. Pure: the folder's watcher calls it with a file's content.
//!
//! Why a file is split before it is parsed: a syntax error ends a YAML stream, and the documents after it
//! would be lost with it. Split at its `---` lines, every document stands or falls alone.

use std::{collections::BTreeMap, marker::PhantomData, sync::Arc};

use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, Error as _},
};

use super::Problem;
use crate::{
    index::validate,
    resources::{Header, Kind, Meaning, Object, ObjectKey, Origin, nullable},
};

/// What one document turned out to be.
#[derive(Debug)]
pub enum Document {
    /// A valid object.
    Object {
        /// Boxed: objects are large.
        object: Box<Object>,
        /// Where it starts.
        origin: Origin,
        /// What it was read from.
        text: Text,
    },
    /// Not a kind of ours.
    Foreign,
    /// Not usable.
    Bad {
        /// Why.
        problem: Problem,
        /// For an authorization policy: the labels of the workloads that it is about, as far as they can
        /// be read. Such workloads are closed until it can be read (fail closed).
        scope: BTreeMap<String, String>,
        /// Where the name cannot be read: the authorization policy that the text seems to be. It closes
        /// its namespace.
        policy: Option<ObjectKey>,
    },
}

/// The text of one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Text {
    /// Whether it is JSON.
    pub json: bool,
    /// It.
    pub text: Arc<str>,
}

/// Reads one object again from its own text; `None` if it is none any more.
pub fn read_again(origin: &Origin, text: &Text) -> Option<Box<Object>> {
    let mut found = Vec::new();
    Part { line: origin.line, text: &text.text }.read(&origin.file, text.json, &mut found);
    match found.pop()? {
        Document::Object { object, .. } if found.is_empty() => Some(object),
        Document::Object { .. } | Document::Foreign | Document::Bad { .. } => None,
    }
}

/// Reads every document of one file.
pub fn read(file: &Arc<str>, text: &str) -> Vec<Document> {
    let json = file.ends_with(".json");
    let mut found = Vec::new();
    let whole = Part { line: 1, text };
    for part in if json { vec![whole] } else { split(text) } {
        part.read(file, json, &mut found);
    }
    found
}

/// One document's text and the line that it starts at.
struct Part<'a> {
    line: u32,
    text: &'a str,
}

/// The documents of a text, each with its first line.
pub(crate) fn documents(text: &str) -> impl Iterator<Item = (u32, &str)> {
    split(text).into_iter().map(|part| (part.first_line(), part.text))
}

/// Splits at lines that begin with `---`.
fn split(text: &str) -> Vec<Part<'_>> {
    let mut parts = Vec::new();
    let (mut start, mut first_line, mut offset, mut line) = (0, 1, 0, 1);
    for text_line in text.split_inclusive('\n') {
        let trimmed = text_line.trim_end();
        if trimmed == "---" || trimmed.starts_with("--- ") {
            parts.push(Part { line: first_line, text: &text[start..offset] });
            // What follows on the separator's own line (`--- # comment`, `--- {…}`) belongs to the next.
            start = offset + 3;
            first_line = line;
        }
        offset += text_line.len();
        line += 1;
    }
    parts.push(Part { line: first_line, text: &text[start..] });
    let is_empty = |text: &str| {
        text.lines().all(|line| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#') || line.starts_with('%') || line == "..."
        })
    };
    parts.retain(|part| !is_empty(part.text));
    parts
}

/// An error of either parser, with the field that it is about.
struct Failure {
    line: Option<u32>,
    path: String,
    reason: String,
}

impl Part<'_> {
    fn read(&self, file: &Arc<str>, json: bool, found: &mut Vec<Document>) {
        let origin = |line: u32| Origin { file: file.clone(), line };
        let header: Header = match self.decode(json, PhantomData::<Header>) {
            Ok(header) => header,
            Err(failure) => return found.push(self.bad(file, None, failure, json)),
        };
        let whole = |reason: String| Failure { line: None, path: String::new(), reason };
        match header.meaning() {
            Meaning::Foreign => found.push(Document::Foreign),
            Meaning::Bad(reason) => found.push(self.bad(file, None, whole(reason), json)),
            Meaning::List => self.read_list(file, json, found),
            Meaning::Known(kind) => {
                let Some(key) = header.key(kind) else {
                    return found.push(self.bad(
                        file,
                        None,
                        whole("metadata.name is missing".to_owned()),
                        json,
                    ));
                };
                found.push(match self.decode(json, OfKind(kind)) {
                    Ok(object) => match validate::object(&object) {
                        Ok(()) => Document::Object {
                            object: Box::new(object),
                            origin: origin(self.first_line()),
                            text: Text { json, text: self.text.into() },
                        },
                        Err(invalid) => {
                            let failure = Failure { line: None, path: invalid.path, reason: invalid.reason };
                            self.bad(file, Some(key), failure, json)
                        }
                    },
                    Err(failure) => self.bad(file, Some(key), failure, json),
                });
            }
        }
    }

    /// A `v1` List: its items are read one by one, by value; a line within the list is not known.
    fn read_list(&self, file: &Arc<str>, json: bool, found: &mut Vec<Document>) {
        #[derive(Default, Deserialize)]
        #[serde(default)]
        struct List {
            #[serde(deserialize_with = "nullable")]
            items: Vec<serde_json::Value>,
        }
        let list: List = match self.decode(json, PhantomData::<List>) {
            Ok(list) => list,
            Err(failure) => return found.push(self.bad(file, None, failure, json)),
        };
        for (position, item) in list.items.into_iter().enumerate() {
            let text = item.to_string();
            let mut inner = Vec::new();
            Part { line: self.line, text: &text }.read(file, true, &mut inner);
            for document in &mut inner {
                match document {
                    Document::Bad { problem, .. } => {
                        problem.path =
                            format!("items[{position}].{}", problem.path).trim_end_matches('.').to_owned();
                        problem.origin.line = self.first_line();
                    }
                    Document::Object { origin, .. } => origin.line = self.first_line(),
                    Document::Foreign => {}
                }
            }
            found.append(&mut inner);
        }
    }

    /// The first line with content: where a reader looks.
    fn first_line(&self) -> u32 {
        let blank = |line: &&str| {
            let line = line.trim();
            line.is_empty() || line.starts_with('#')
        };
        self.line + u32::try_from(self.text.lines().take_while(blank).count()).unwrap_or(0)
    }

    fn bad(&self, file: &Arc<str>, object: Option<ObjectKey>, failure: Failure, json: bool) -> Document {
        let line = failure.line.map_or_else(|| self.first_line(), |line| self.line + line.saturating_sub(1));
        let scope = match &object {
            Some(key) if key.kind == Kind::AuthorizationPolicy => {
                let scope = self.decode(json, PhantomData::<Scope>);
                scope.map_or_else(|_| BTreeMap::new(), |scope| scope.spec.selector.match_labels)
            }
            _ => BTreeMap::new(),
        };
        let policy = if object.is_none() { self.policy() } else { None };
        Document::Bad {
            policy,
            problem: Problem {
                object,
                origin: Origin { file: file.clone(), line },
                path: failure.path,
                reason: failure.reason,
                kept_last_good: false,
            },
            scope,
        }
    }

    /// The authorization policy that an unreadable text seems to be. Why guess: a typo in a policy must not
    /// let everybody in.
    fn policy(&self) -> Option<ObjectKey> {
        let lines = self.text.lines().filter(|line| !line.trim_start().starts_with('#'));
        let bare: String = lines
            .flat_map(|line| line.chars().chain(['\n']))
            .filter(|c| !matches!(c, '"' | '\'' | ' ' | '\t' | '\r'))
            .collect();
        let after = |field: &str| {
            let mut found = bare.match_indices(field);
            // `name:` must not be found in `hostname:`.
            let (at, _) = found.find(|(at, _)| !bare[..*at].ends_with(|c: char| c.is_alphanumeric()))?;
            let rest = &bare[at + field.len()..];
            let end = rest.find(['\n', ',', '}', '#']).unwrap_or(rest.len());
            Some(&rest[..end]).filter(|text| !text.is_empty() && text.len() <= 253)
        };
        bare.contains("kind:AuthorizationPolicy").then(|| {
            let unknown = format!("unreadable-{}", self.line);
            let name = after("name:").unwrap_or(&unknown);
            ObjectKey::new(Kind::AuthorizationPolicy, after("namespace:").unwrap_or_default(), name)
        })
    }

    fn decode<T>(
        &self,
        json: bool,
        seed: impl for<'de> DeserializeSeed<'de, Value = T>,
    ) -> Result<T, Failure> {
        if json { decode_json(self.text, seed) } else { decode_yaml(self.text, seed) }
    }
}

fn decode_yaml<T>(text: &str, seed: impl for<'de> DeserializeSeed<'de, Value = T>) -> Result<T, Failure> {
    let options = serde_saphyr::options! { legacy_octal_numbers: true, with_snippet: false };
    let mut path = String::new();
    let result = serde_saphyr::with_deserializer_from_str_with_options(text, options, |de| {
        let mut track = serde_path_to_error::Track::new();
        seed.deserialize(serde_path_to_error::Deserializer::new(de, &mut track)).inspect_err(|_| {
            path = track.path().to_string();
        })
    });
    result.map_err(|error| {
        let error = error.without_snippet();
        let line = error.location().and_then(|at| u32::try_from(at.line()).ok()).filter(|line| *line > 0);
        Failure { line, path: clean(path), reason: one_line(&error.to_string()) }
    })
}

fn decode_json<T>(text: &str, seed: impl for<'de> DeserializeSeed<'de, Value = T>) -> Result<T, Failure> {
    let mut track = serde_path_to_error::Track::new();
    let mut json = serde_json::Deserializer::from_str(text);
    let result = seed.deserialize(serde_path_to_error::Deserializer::new(&mut json, &mut track));
    result.and_then(|value| json.end().map(|()| value).map_err(serde_json::Error::custom)).map_err(|error| {
        Failure {
            line: u32::try_from(error.line()).ok().filter(|line| *line > 0),
            path: clean(track.path().to_string()),
            reason: one_line(&error.to_string()),
        }
    })
}

/// `serde_path_to_error` writes `.` for the whole document.
fn clean(path: String) -> String {
    if path == "." { String::new() } else { path }
}

/// Parsers add positions of their own, relative to the document; ours are relative to the file.
fn one_line(message: &str) -> String {
    let first = message.lines().next().unwrap_or(message).trim();
    let cut = first.find(" at line ").or_else(|| first.find(" (line ")).unwrap_or(first.len());
    let first = first[..cut].trim_start_matches("error: ");
    // `line 5 column 11: …`
    match first.split_once(": ") {
        Some((position, rest)) if position.starts_with("line ") => rest.to_owned(),
        _ => first.to_owned(),
    }
}

/// Decodes an object whose kind is known.
struct OfKind(Kind);

impl<'de> DeserializeSeed<'de> for OfKind {
    type Value = Object;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Object, D::Error> {
        Object::decode(self.0, from)
    }
}

/// The selector of a policy whose other fields may not decode.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Scope {
    spec: ScopeSpec,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct ScopeSpec {
    selector: ScopeSelector,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ScopeSelector {
    match_labels: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> Vec<Document> {
        read(&"mesh.yaml".into(), text)
    }

    fn problem(document: &Document) -> &Problem {
        match document {
            Document::Bad { problem, .. } => problem,
            Document::Object { .. } | Document::Foreign => panic!("{document:?}"),
        }
    }

    #[test]
    fn a_bad_document_leaves_the_others() {
        let text = "\
# services
apiVersion: v1
kind: Service
metadata: {name: a, namespace: shop}
spec:
  ports: [{port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: b, namespace: shop}
spec:
  ports:
    - port: 80
    - port: eighty
---
apiVersion: v1
kind: [unclosed
--- # last
apiVersion: v1
kind: Service
metadata: {name: c, namespace: shop}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: d}
";
        let found = read_text(text);
        assert_eq!(found.len(), 5, "{found:#?}");
        assert!(matches!(&found[0], Document::Object { origin, .. } if origin.line == 2), "{:?}", found[0]);
        let bad = problem(&found[1]);
        assert_eq!(bad.object.as_ref().unwrap().to_string(), "Service/shop/b");
        assert_eq!(bad.path, "spec.ports[1].port");
        assert_eq!(bad.origin.to_string(), "mesh.yaml:14", "{bad:?}");
        assert!(!bad.reason.is_empty());
        let syntax = problem(&found[2]);
        assert!(syntax.object.is_none());
        assert!((17..=18).contains(&syntax.origin.line), "{syntax:?}");
        assert!(matches!(&found[3], Document::Object { .. }));
        assert!(matches!(&found[4], Document::Foreign));
    }

    #[test]
    fn values_are_checked_where_they_stand() {
        let text = "\
apiVersion: weft.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: t, namespace: shop}
spec:
  targetRefs: [{kind: Service, name: a}]
  timeouts:
    request: 10 seconds
";
        let found = read_text(text);
        let bad = problem(&found[0]);
        assert_eq!(bad.path, "spec.timeouts.request");
        assert_eq!(bad.origin.line, 7, "{bad:?}");
        assert!(bad.reason.contains("is not a duration"), "{bad:?}");
    }

    #[test]
    fn authorization_refuses_what_it_does_not_know_and_names_its_workloads() {
        let text = "\
apiVersion: weft.dev/v1alpha1
kind: AuthorizationPolicy
metadata: {name: p, namespace: shop}
spec:
  selector: {matchLabels: {app: pay}}
  action: Allow
  rules:
    - from: [{identitys: [\"*\"]}]
";
        let found = read_text(text);
        let bad = problem(&found[0]);
        assert!(bad.path.starts_with("spec.rules[0].from[0]"), "{bad:?}");
        assert!(bad.reason.contains("identitys"), "{bad:?}");
        assert!(matches!(&found[0], Document::Bad { scope, .. } if scope["app"] == "pay"));
    }

    #[test]
    fn routes_ignore_unknown_fields() {
        let text = "\
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: r, namespace: shop}
spec:
  futureField: {a: 1}
  parentRefs: [{group: core, kind: Service, name: a, port: 80}]
  rules:
    - matches: [{path: {type: Glob, value: /x}}]
      backendRefs: null
";
        assert!(matches!(&read_text(text)[0], Document::Object { .. }));
    }

    #[test]
    fn a_list_in_json_is_read_item_by_item_whatever_the_file_is_called() {
        let text = r#"{"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a"}},
            {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "b"}, "spec": {"ports": [{"port": "x"}]}}]}"#;
        for file in ["list.json", "list.yaml"] {
            let found = read(&file.into(), text);
            assert_eq!(found.len(), 2, "{file}");
            assert!(matches!(&found[0], Document::Object { .. }));
            assert_eq!(problem(&found[1]).path, "items[1].spec.ports[0].port");
        }
    }

    #[test]
    fn weft_kinds_that_do_not_exist_are_reported() {
        let found = read_text("apiVersion: weft.dev/v1alpha1\nkind: TraficPolicy\nmetadata: {name: x}\n");
        assert!(problem(&found[0]).reason.contains("TraficPolicy"));
    }
}
