//! Exact draws from a caller's random source.
//!
//! Why not a crate: the core takes `&mut dyn RngCore` so that a seed replays a whole simulation, and
//! two small functions are all that its decisions need.

use rand_core::RngCore;

/// Uniform in `0.0..1.0`.
pub(crate) fn unit(rng: &mut dyn RngCore) -> f64 {
    // 53 bits: every value is exact in an f64.
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Uniform in `0..n`, without bias (Lemire's multiplication with rejection). `n` must not be 0.
pub(crate) fn below(rng: &mut dyn RngCore, n: u64) -> u64 {
    debug_assert!(n > 0, "an empty range has no members");
    if n <= 1 {
        return 0;
    }
    let mut product = u128::from(rng.next_u64()) * u128::from(n);
    if (product as u64) < n {
        let floor = n.wrapping_neg() % n;
        while (product as u64) < floor {
            product = u128::from(rng.next_u64()) * u128::from(n);
        }
    }
    (product >> 64) as u64
}

/// [`below`] for an index.
pub(crate) fn index(rng: &mut dyn RngCore, n: usize) -> usize {
    below(rng, n as u64) as usize
}

#[cfg(test)]
mod tests {
    use rand::{SeedableRng, rngs::SmallRng};

    use super::*;

    #[test]
    fn draws_stay_inside_and_cover_the_range() {
        let mut rng = SmallRng::seed_from_u64(1);
        let mut seen = [0u32; 7];
        for _ in 0..7_000 {
            seen[index(&mut rng, 7)] += 1;
            let u = unit(&mut rng);
            assert!((0.0..1.0).contains(&u));
        }
        assert!(seen.iter().all(|&n| (850..1150).contains(&n)), "{seen:?}");
        assert_eq!(below(&mut rng, 1), 0);
    }
}
