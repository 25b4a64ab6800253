//! What the tests stand on: pods as network namespaces, whole meshes of real binaries, and apps with habits.

pub mod apps;
pub mod cluster;
pub mod link;
pub mod netns;
pub mod streams;
pub mod tls;
pub mod wire;
