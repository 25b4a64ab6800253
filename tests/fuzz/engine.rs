//! A fuzzer in two hundred lines, for a stable toolchain: seeded, bound by time, fed by what it has seen.
//!
//! Why not libFuzzer: it wants instrumented code, so a nightly compiler or flags that rebuild the world. Here a target
//! says in a number what came of an input (the variant, the error and the field that it names, the rule that was
//! found); an input that brings a number not seen before is kept and mutated further. That is coarser than coverage,
//! and enough to walk through every error of a parser, because our errors are values that name their place.
//!
//! A target checks properties, not only that it does not panic. Whatever panics is made smaller, written to
//! `target/fuzz/<target>/`, and fails the test; the corpus (`tests/fuzz/corpus/<target>/`) is tried first, each time.
//!
//! `WEFT_FUZZ_SECONDS` says how long each target runs, `WEFT_FUZZ_SEED` from where (the same inputs in the same order),
//! `WEFT_FUZZ_KEEP=1` adds what is new to the corpus.

use std::{
    collections::{BTreeMap, HashSet},
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rand::{Rng, RngCore, SeedableRng, rngs::SmallRng};

/// What is fuzzed.
pub(crate) struct Target {
    /// Its name, and that of its corpus.
    pub(crate) name: &'static str,
    /// Tries one input: checks its properties and says what came of it.
    pub(crate) run: fn(&[u8]) -> u64,
    /// Inputs to begin with.
    pub(crate) seeds: fn() -> Vec<Vec<u8>>,
    /// Words of the language.
    pub(crate) words: &'static [&'static [u8]],
    /// How inputs are built.
    pub(crate) shape: Shape,
}

/// How inputs are built.
#[derive(Clone, Copy)]
pub(crate) enum Shape {
    /// Any bytes.
    Bytes,
    /// One byte that says which message, then the message.
    Message,
    /// The length of a message (two bytes, little end first), the message, then text.
    MessageAndText,
}

/// Runs one target for its time.
pub(crate) fn fuzz(target: &Target) {
    let seconds = setting("WEFT_FUZZ_SECONDS").unwrap_or(1.5);
    let seed = setting("WEFT_FUZZ_SEED").map_or(0x5eed, |seed| seed as u64);
    let mut rng = SmallRng::seed_from_u64(seed);
    let corpus = folder(target.name);
    let (mut pool, mut seen) = (Vec::new(), HashSet::new());
    let mut longest = Duration::ZERO;
    for (name, input) in read(&corpus) {
        let came = attempt(target, &input).unwrap_or_else(|| panic!("{name} of the corpus fails again"));
        seen.insert(came);
        pool.push(input);
    }
    let committed = pool.len();
    pool.extend((target.seeds)());
    assert!(!pool.is_empty(), "{}: nothing to begin with", target.name);
    let (start, mut runs, mut fresh) = (Instant::now(), 0_u64, pool.len());
    while start.elapsed().as_secs_f64() < seconds {
        let input = if fresh > committed && runs < pool.len() as u64 {
            // Each seed once as it is.
            pool[runs as usize].clone()
        } else {
            mutated(target, &pool, &mut rng)
        };
        runs += 1;
        let began = Instant::now();
        let Some(came) = attempt(target, &input) else { failed(target, input, seed) };
        longest = longest.max(began.elapsed());
        if seen.insert(came) && input.len() <= MAX_KEPT && pool.len() < MAX_POOL {
            if std::env::var_os("WEFT_FUZZ_KEEP").is_some() && pool.len() < MAX_COMMITTED {
                keep(&corpus, &input);
            }
            pool.push(input);
            fresh += 1;
        }
    }
    println!(
        "figure: fuzz {}: {runs} inputs in {seconds} s, {} kinds of outcome, slowest {} ms, 0 crashes (bound 0)",
        target.name,
        seen.len(),
        longest.as_millis()
    );
    assert!(longest < Duration::from_secs(10), "{}: one input took {longest:?}", target.name);
}

fn attempt(target: &Target, input: &[u8]) -> Option<u64> {
    catch_unwind(AssertUnwindSafe(|| (target.run)(input))).ok()
}

/// Makes a failing input smaller, writes it down and ends the test.
fn failed(target: &Target, mut input: Vec<u8>, seed: u64) -> ! {
    let mut size = input.len() / 2;
    let deadline = Instant::now() + Duration::from_secs(5);
    while size > 0 && Instant::now() < deadline {
        let mut at = 0;
        while at + size <= input.len() && Instant::now() < deadline {
            let mut smaller = input.clone();
            smaller.drain(at..at + size);
            if attempt(target, &smaller).is_none() {
                input = smaller;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    let folder = root().join("target/fuzz").join(target.name);
    let path = keep(&folder, &input);
    panic!(
        "{}: an input of {} bytes fails (seed {seed}): {}\n{}",
        target.name,
        input.len(),
        path.display(),
        input.escape_ascii()
    );
}

fn mutated(target: &Target, pool: &[Vec<u8>], rng: &mut SmallRng) -> Vec<u8> {
    let pick = |rng: &mut SmallRng| &pool[rng.random_range(0..pool.len())];
    let mut input = pick(rng).clone();
    for _ in 0..1 << rng.random_range(0..4) {
        let other = pick(rng);
        match target.shape {
            Shape::Bytes => bytes(&mut input, other, target.words, rng),
            Shape::Message if rng.random_bool(0.8) && input.len() > 1 => {
                let rest = message(&input[1..], other.get(1..).unwrap_or_default(), target.words, rng, 4);
                input.truncate(1);
                input.extend(rest);
            }
            Shape::Message => bytes(&mut input, other, target.words, rng),
            Shape::MessageAndText => {
                let ((body, text), (theirs, words)) = (framed(&input), framed(other));
                let (mut body, mut text) = (body.to_vec(), text.to_vec());
                if rng.random_bool(0.5) {
                    body = message(&body, theirs, target.words, rng, 4);
                } else {
                    bytes(&mut text, words, target.words, rng);
                }
                input = frame(&body, &text);
            }
        }
        input.truncate(MAX_INPUT);
    }
    input
}

/// A message and a text in one input.
pub(crate) fn frame(message: &[u8], text: &[u8]) -> Vec<u8> {
    let message = &message[..message.len().min(usize::from(u16::MAX))];
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_le_bytes()[..], message, text].concat()
}

/// Takes it apart; whatever the bytes are.
pub(crate) fn framed(input: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = input.split_first_chunk::<2>() else { return (&[], &[]) };
    rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()))
}

/// Changes bytes, with no idea what they mean but for the words.
fn bytes(input: &mut Vec<u8>, other: &[u8], words: &[&[u8]], rng: &mut SmallRng) {
    let at = rng.random_range(0..=input.len());
    let upto = |rng: &mut SmallRng, most: usize| rng.random_range(0..=most.min(32));
    match rng.random_range(0..9) {
        0 if at < input.len() => input[at] ^= 1 << rng.random_range(0..8),
        1 if at < input.len() => input[at] = ODD[rng.random_range(0..ODD.len())],
        2 if at < input.len() => input[at] = rng.random(),
        3 => input.insert(at, ODD[rng.random_range(0..ODD.len())]),
        4 => {
            let n = upto(rng, input.len() - at);
            input.drain(at..at + n);
        }
        5 => {
            let piece = input[at..at + upto(rng, input.len() - at)].to_vec();
            let to = rng.random_range(0..=input.len());
            input.splice(to..to, piece);
        }
        6 if !other.is_empty() => {
            let from = rng.random_range(0..other.len());
            let n = rng.random_range(1..=other.len() - from);
            input.truncate(at);
            input.extend_from_slice(&other[from..from + n]);
        }
        7 => input.truncate(at),
        _ if !words.is_empty() => {
            let word = words[rng.random_range(0..words.len())];
            let end = if rng.random_bool(0.5) { at } else { (at + word.len()).min(input.len()) };
            input.splice(at..end, word.iter().copied());
        }
        _ => {}
    }
}

/// Changes a protobuf message: fields go, come twice, are swapped, changed, taken from another message; lengths stay
/// right, so that what is inside is reached.
fn message(body: &[u8], other: &[u8], words: &[&[u8]], rng: &mut SmallRng, depth: u8) -> Vec<u8> {
    let Some(mut fields) = fields(body).filter(|fields| !fields.is_empty()) else {
        let mut text = body.to_vec();
        bytes(&mut text, other, words, rng);
        return text;
    };
    let at = rng.random_range(0..fields.len());
    match rng.random_range(0..12) {
        0 => drop(fields.remove(at)),
        1 => fields.insert(at, fields[at].clone()),
        2 => {
            let to = rng.random_range(0..fields.len());
            fields.swap(at, to);
        }
        3 => {
            let theirs = self::fields(other).unwrap_or_default();
            if !theirs.is_empty() {
                fields.insert(at, theirs[rng.random_range(0..theirs.len())].clone());
            }
        }
        4 => fields[at].number = rng.random_range(1..24),
        _ => match &mut fields[at].value {
            Value::Number(number) => {
                *number = match rng.random_range(0..4) {
                    0 => number.wrapping_add(1),
                    1 => number.wrapping_sub(1),
                    2 => [0, 1, 2, 3, 65_535, 65_536, u64::from(u32::MAX), u64::MAX][rng.random_range(0..8)],
                    _ => rng.next_u64() >> rng.random_range(0..64),
                }
            }
            Value::Fixed(fixed) => {
                let place = rng.random_range(0..fixed.len());
                fixed[place] = rng.random();
            }
            Value::Bytes(inner) if depth > 0 => *inner = message(inner, other, words, rng, depth - 1),
            Value::Bytes(inner) => bytes(inner, other, words, rng),
        },
    }
    encode(&fields)
}

#[derive(Clone)]
struct Field {
    number: u64,
    value: Value,
}

#[derive(Clone)]
enum Value {
    Number(u64),
    Fixed(Vec<u8>),
    Bytes(Vec<u8>),
}

/// The fields of a message, if the bytes are one.
fn fields(mut body: &[u8]) -> Option<Vec<Field>> {
    let mut fields = Vec::new();
    while !body.is_empty() {
        let key = varint(&mut body)?;
        let mut take = |n: usize| {
            let (taken, rest) = body.split_at_checked(n)?;
            body = rest;
            Some(taken.to_vec())
        };
        let value = match key & 7 {
            1 => Value::Fixed(take(8)?),
            5 => Value::Fixed(take(4)?),
            0 => Value::Number(varint(&mut body)?),
            2 => {
                let length = usize::try_from(varint(&mut body)?).ok()?;
                let (taken, rest) = body.split_at_checked(length)?;
                body = rest;
                Value::Bytes(taken.to_vec())
            }
            _ => return None,
        };
        if key >> 3 == 0 {
            return None;
        }
        fields.push(Field { number: key >> 3, value });
    }
    Some(fields)
}

fn encode(fields: &[Field]) -> Vec<u8> {
    let mut out = Vec::new();
    for Field { number, value } in fields {
        let mut key = |kind: u64| put(&mut out, number << 3 | kind);
        match value {
            Value::Number(number) => {
                key(0);
                put(&mut out, *number);
            }
            Value::Fixed(bytes) => {
                key(if bytes.len() == 8 { 1 } else { 5 });
                out.extend_from_slice(bytes);
            }
            Value::Bytes(bytes) => {
                key(2);
                put(&mut out, bytes.len() as u64);
                out.extend_from_slice(bytes);
            }
        }
    }
    out
}

fn varint(body: &mut &[u8]) -> Option<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = body.split_first()?;
        *body = rest;
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(number);
        }
    }
    None
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn setting(name: &str) -> Option<f64> {
    std::env::var(name).ok()?.parse().ok()
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name)
}

/// By name, so that a run can be repeated.
fn read(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let Ok(entries) = fs::read_dir(folder) else { return BTreeMap::new() };
    let read = |entry: fs::DirEntry| {
        (entry.file_name().to_string_lossy().into_owned(), fs::read(entry.path()).unwrap())
    };
    entries.map(|entry| read(entry.unwrap())).collect()
}

fn keep(folder: &Path, input: &[u8]) -> PathBuf {
    fs::create_dir_all(folder).unwrap();
    let path = folder.join(format!("{:016x}", hash(input)));
    fs::write(&path, input).unwrap();
    path
}

/// FNV-1a: the same in every run and build, which is all that is asked of it.
pub(crate) fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What parsers stumble over.
const ODD: &[u8] = b"\0\x01\t\n\r \"%&*+,-./0:;=?@A\\_{|}~\x7f\x80\xc0\xff";
/// Longer inputs find nothing that shorter ones do not, but for the 16 KiB of a ClientHello.
const MAX_INPUT: usize = 20 * 1024;
const MAX_KEPT: usize = 4 * 1024;
const MAX_POOL: usize = 4_096;
/// Inputs of one target in the repository.
const MAX_COMMITTED: usize = 40;
