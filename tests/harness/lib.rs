//! What the tests stand on: pods as network namespaces, and the rest of a world in which a mesh can be watched.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod netns;
