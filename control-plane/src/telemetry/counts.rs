//! A histogram that is still added to, in as many bytes as it has values.
//!
//! Why not a decoded one: with its thousand or two of counters that takes 10 KiB, four of them a series, and most are
//! zero. A mesh has thousands of series; what ten seconds count of one of them is some dozens of values. Why read from
//! the wire by hand: making and adding counters of which almost all are zero was most of what a report cost.
//!
//! The wire is HdrHistogram's V2: a header, then counts as zigzag LEB128, a negative one for a run of zeros.

use super::histogram::{self, Refused};

/// Counters that are not zero, by index. A sum that is too large stays at the largest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts(Vec<(u16, u32)>);

impl Counts {
    /// Reads an encoded histogram; nothing is one without values.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, Refused> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        let (header, mut rest) = histogram::check(bytes)?;
        if header.cookie != COOKIE || header.offset != 0 || header.low != 1 {
            return Err(Refused::Content);
        }
        rest = rest.get(..header.len).ok_or(Refused::Content)?;
        let mut counts = Vec::new();
        let mut index = 0_u64;
        while !rest.is_empty() {
            let count = zigzag(&mut rest).ok_or(Refused::Content)?;
            if count > 0 {
                let at = u16::try_from(index).ok().filter(|at| *at < COUNTERS).ok_or(Refused::Content)?;
                counts.push((at, u32::try_from(count).unwrap_or(u32::MAX)));
            }
            index = index.checked_add(count.min(0).unsigned_abs().max(1)).ok_or(Refused::Content)?;
        }
        counts.shrink_to_fit();
        Ok(Self(counts))
    }

    /// Adds what was counted elsewhere.
    pub(super) fn add(&mut self, more: &Self) {
        let known = self.0.len();
        let mut at = 0;
        for (index, count) in &more.0 {
            while at < known && self.0[at].0 < *index {
                at += 1;
            }
            match self.0.get_mut(at) {
                Some((same, sum)) if at < known && same == index => *sum = sum.saturating_add(*count),
                Some(_) | None => self.0.push((*index, *count)),
            }
        }
        if self.0.len() > known {
            self.0.sort_unstable_by_key(|(index, _)| *index);
        }
    }

    /// As it came; no bytes for no values.
    pub(super) fn encode(&self) -> Vec<u8> {
        let Some((last, _)) = self.0.last() else { return Vec::new() };
        let mut bytes = Vec::with_capacity(HEADER + 3 * self.0.len());
        bytes.extend_from_slice(&COOKIE.to_be_bytes());
        bytes.extend_from_slice(&[0; 8]); // the length, below; the offset
        bytes.extend_from_slice(&histogram::DIGITS.to_be_bytes());
        bytes.extend_from_slice(&1_u64.to_be_bytes());
        bytes.extend_from_slice(&highest(*last).clamp(2, histogram::MAX_HIGH).to_be_bytes());
        bytes.extend_from_slice(&1_f64.to_be_bytes());
        let mut next = 0;
        for (index, count) in &self.0 {
            if *index > next {
                put(&mut bytes, -i64::from(index - next));
            }
            put(&mut bytes, i64::from(*count));
            next = index + 1;
        }
        let len = u32::try_from(bytes.len() - HEADER).unwrap_or(u32::MAX);
        bytes[4..8].copy_from_slice(&len.to_be_bytes());
        bytes.shrink_to_fit();
        bytes
    }
}

/// The largest value that is counted there.
fn highest(index: u16) -> u64 {
    let (bucket, sub) = (index / HALF, u64::from(index % HALF));
    match bucket {
        0 => sub,
        _ => ((sub + u64::from(HALF) + 1) << (bucket - 1)) - 1,
    }
}

/// One number; the ninth byte is taken whole.
fn zigzag(bytes: &mut &[u8]) -> Option<i64> {
    let mut value = 0_u64;
    for at in 0..9 {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        let bits = if at < 8 { byte & 0x7f } else { *byte };
        value |= u64::from(bits) << (7 * at);
        if at == 8 || byte & 0x80 == 0 {
            break;
        }
    }
    Some((value >> 1).cast_signed() ^ -((value & 1).cast_signed()))
}

fn put(bytes: &mut Vec<u8>, value: i64) {
    let mut value = ((value << 1) ^ (value >> 63)).cast_unsigned();
    // Indices and counts of 32 bits: never nine bytes.
    while value >= 0x80 {
        bytes.push((value & 0x7f) as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

const COOKIE: u32 = 0x1c84_9313;
const HEADER: usize = 40;
/// Of two digits: counters of one bucket, but for the first, which has two halves.
const HALF: u16 = 128;
/// More than an hour has in two digits.
const COUNTERS: u16 = 4_096;

#[cfg(test)]
mod tests {
    use hdrhistogram::Histogram;

    use super::*;

    fn of(values: &[u64]) -> Histogram<u64> {
        let mut histogram = histogram::empty();
        values.iter().for_each(|value| histogram.record(*value).unwrap());
        histogram
    }

    fn decoded(counts: &Counts) -> Histogram<u64> {
        histogram::decode(&counts.encode()).unwrap().unwrap()
    }

    #[test]
    fn counts_are_those_of_the_library() {
        let mut seed = 7_u64;
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            seed >> 33
        };
        let (mut total, mut whole) = (Counts::default(), histogram::empty());
        for round in 0..300 {
            let most = [1, 3, 127, 128, 255, 256, 70_000, 3_600_000_000][round % 8];
            let values: Vec<u64> = (0..1 + next() % 40).map(|_| next() % (most + 1)).collect();
            let one = of(&values);
            let read = Counts::read(&histogram::encode(&one)).unwrap();
            assert_eq!(decoded(&read), one, "{values:?}");
            total.add(&read);
            whole.add(&one).unwrap();
            assert_eq!(decoded(&total), whole);
        }
        // What it wrote, it reads.
        assert_eq!(Counts::read(&total.encode()).unwrap(), total);
    }

    #[test]
    fn every_edge_of_a_bucket_is_counted_where_the_library_counts_it() {
        for shift in 0..=30 {
            for value in [(1_u64 << shift) - 1, 1 << shift, (1 << shift) + 1] {
                let one = of(&[value]);
                assert_eq!(decoded(&Counts::read(&histogram::encode(&one)).unwrap()), one, "{value}");
            }
        }
        let mut hour = Histogram::<u64>::new_with_max(histogram::MAX_HIGH, 2).unwrap();
        hour.record(histogram::MAX_HIGH).unwrap();
        assert_eq!(decoded(&Counts::read(&histogram::encode(&hour)).unwrap()), hour);
    }

    #[test]
    fn nonsense_is_refused_and_sums_end_at_the_largest() {
        assert_eq!(Counts::read(&[]), Ok(Counts::default()));
        let good = histogram::encode(&of(&[1, 5, 5_000]));
        let with = |at: usize, byte: u8| {
            let mut bytes = good.clone();
            bytes[at] = byte;
            Counts::read(&bytes)
        };
        assert!(Counts::read(&good).is_ok());
        assert_eq!(with(0, 0), Err(Refused::Content), "another format");
        assert_eq!(with(7, 255), Err(Refused::Content), "shorter than it says");
        assert_eq!(with(15, 5), Err(Refused::Header), "five digits");
        assert_eq!(with(23, 2), Err(Refused::Content), "another unit");
        let mut endless = good[..HEADER].to_vec();
        put(&mut endless, -i64::from(u32::MAX));
        put(&mut endless, 1);
        let len = u32::try_from(endless.len() - HEADER).unwrap();
        endless[4..8].copy_from_slice(&len.to_be_bytes());
        assert_eq!(Counts::read(&endless), Err(Refused::Content), "beyond an hour");
        let mut sum = Counts(vec![(3, u32::MAX)]);
        sum.add(&Counts(vec![(2, 1), (3, 1)]));
        assert_eq!(sum, Counts(vec![(2, 1), (3, u32::MAX)]));
    }
}
