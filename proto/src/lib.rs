//! The wire contract of Plumb, generated from `plumb/v1/*.proto`. Nothing here has logic.

/// Messages, clients and servers of package `plumb.v1`.
#[expect(
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated code; the comments are the proto's"
)]
pub mod v1 {
    tonic::include_proto!("plumb.v1");
}

/// Encoded `FileDescriptorSet` of the package, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/plumb.v1.bin"));
