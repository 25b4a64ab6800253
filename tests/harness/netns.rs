//! Pods as network namespaces: the very code that `weft demo` stands on, so that what the tests prove is
//! what the demo shows.

pub use weft_control_plane::cli::demo::netns::*;

/// A world for a test, or `None` where there can be none: the reason is printed past the test runner's
/// capture, so that a skipped test is never mistaken for a passed one.
pub fn world_or_skip(test: &str) -> Option<World> {
    if let Err(reason) = usable() {
        crate::apps::skip(test, &reason.to_string());
        return None;
    }
    Some(World::new("test").expect("a world, since namespaces can be made"))
}
