//! Buffers that bytes pass through, lent to whoever has some in hand.
//!
//! Why: a stream that waits needs none, and of those an app may leave thousands; a busy one would pay for a large buffer
//! (allocated, cleared, grown) each time that it has waited for a moment. So a worker's streams share a few, and each
//! has one only between reading bytes and having written them.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

/// How large; each is twice the one before. More than the last buys nothing on 16 KiB records of TLS.
const SIZES: [usize; 5] = [8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10];
/// Buffers of a size that are kept while nobody has them: more streams that are stalled at a time are rare.
const KEPT: usize = 2;

thread_local! {
    // Of a thread and not of a `Worker`: everything that carries bytes would be handed it for this alone.
    static FREE: RefCell<[Vec<Vec<u8>>; SIZES.len()]> = const { RefCell::new([const { Vec::new() }; SIZES.len()]) };
}

/// Which size a stream is best served with, as its reads have shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Size(usize);

impl Size {
    /// After a read that brought so much.
    pub(crate) fn after(self, read: usize) -> Self {
        match SIZES.get(self.0) {
            Some(&size) if read >= size => Self((self.0 + 1).min(SIZES.len() - 1)),
            Some(&size) if read < size / 4 => Self(self.0.saturating_sub(1)),
            Some(_) | None => self,
        }
    }
}

/// A buffer, given back when dropped. What it holds is of whoever had it before.
#[derive(Debug)]
pub(crate) struct Lent {
    bytes: Vec<u8>,
    size: Size,
}

impl Lent {
    pub(crate) fn take(size: Size) -> Self {
        let kept = FREE.with_borrow_mut(|free| free.get_mut(size.0).and_then(Vec::pop));
        let bytes = kept.unwrap_or_else(|| vec![0; SIZES.get(size.0).copied().unwrap_or(SIZES[0])]);
        Self { bytes, size }
    }
}

impl Deref for Lent {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl DerefMut for Lent {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.bytes);
        // An error: the thread ends.
        let _ = FREE.try_with(|free| {
            if let Some(kept) = free.borrow_mut().get_mut(self.size.0).filter(|kept| kept.len() < KEPT) {
                kept.push(bytes);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_that_fill_a_buffer_ask_for_a_larger_one_and_small_ones_for_a_smaller() {
        let mut size = Size::default();
        for (read, expected) in [(8 << 10, 1), (16 << 10, 2), (16 << 10, 2), (100, 1), (100, 0), (100, 0)] {
            size = size.after(read);
            assert_eq!(size, Size(expected), "after {read} bytes");
        }
        for _ in 0..9 {
            size = size.after(1 << 20);
        }
        assert_eq!(Lent::take(size).len(), 128 << 10);
    }

    #[test]
    fn a_buffer_is_lent_again_and_only_a_few_are_kept() {
        let lent: Vec<Lent> = (0..5).map(|_| Lent::take(Size(1))).collect();
        let first = lent[0].as_ptr();
        assert!(lent.iter().all(|buffer| buffer.len() == 16 << 10));
        drop(lent);
        FREE.with_borrow(|free| assert_eq!(free[1].len(), KEPT));
        let again = [Lent::take(Size(1)), Lent::take(Size(1))];
        assert!(again.iter().any(|buffer| buffer.as_ptr() == first), "not the one that was given back");
    }
}
