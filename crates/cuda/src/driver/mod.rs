//! Devices, through NVIDIA's driver. Everything that calls it is in this folder.
//!
//! Two rules hold throughout. Every call is made with the device's context current on the calling
//! thread ([`Gpu`] sees to it). And a handle's owner ([`Stream`], [`Buffer`], [`Module`], …) keeps
//! what it depends on alive, so that things may be dropped in any order.

mod api;
mod device;
mod graph;
mod launch;
mod memory;
mod module;
mod stream;
mod tensor_map;

pub use api::driver_version;
pub use device::{DeviceMemory, Gpu, Properties};
pub use graph::{Graph, GraphExec, KernelNode};
pub use launch::{Args, LaunchShape, Plain, PreparedLaunch, RawLaunch};
pub use memory::{Buffer, PinnedBuffer};
pub use module::{Function, FunctionAttributes, Module};
pub use stream::{Event, Stream};
pub use tensor_map::{
    L2Promotion, MapElement, OobFill, Swizzle, TensorMap, TensorMapSpec, WindowBox,
};
