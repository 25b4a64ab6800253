//! Pods as network namespaces: the very code that `weft demo` stands on, so that what the tests prove is
//! what the demo shows.

#[path = "../../control-plane/src/cli/demo/netns.rs"]
mod shared;

pub use shared::*;

use std::io::Write as _;

/// A world for a test, or `None` where there can be none: the reason is printed past the test runner's
/// capture, so that a skipped test is never mistaken for a passed one.
pub fn world_or_skip(test: &str) -> Option<World> {
    if let Err(reason) = usable() {
        let _ = writeln!(std::io::stderr(), "{test}: SKIPPED: {reason}");
        return None;
    }
    Some(World::new("test").expect("a world, since namespaces can be made"))
}
