//! [`PreparedLaunch`]: a kernel with its grid and arguments, checked and packed once, so that a
//! launch is one call of the driver.

use super::device::Gpu;
use super::memory::Buffer;
use super::module::Function;
use super::stream::Stream;
use super::tensor_map::TensorMap;
use cudarc::driver::sys;
use serde::{Deserialize, Serialize};
use std::ffi::{c_int, c_void};
use std::fmt;
use std::ptr::null_mut;
use tilewright_base::{Error, Result};

/// How many blocks of how many threads, and with what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LaunchShape {
    /// Blocks.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub block: [u32; 3],
    /// Blocks of a cluster; `[1, 1, 1]` for none. Divides the grid.
    pub cluster: [u32; 3],
    /// Shared memory beside what the kernel declares, in bytes. Any amount that the device has.
    pub smem_bytes: u32,
    /// The kernel may start before the one before it on the stream has ended (programmatic dependent
    /// launch); it waits itself, with `griddepcontrol.wait`, before it touches what that one writes.
    pub programmatic: bool,
    /// All blocks run at once, so that they may wait for each other.
    pub cooperative: bool,
}

impl Default for LaunchShape {
    /// One block of one thread.
    fn default() -> LaunchShape {
        LaunchShape {
            grid: [1; 3],
            block: [1; 3],
            cluster: [1; 3],
            smem_bytes: 0,
            programmatic: false,
            cooperative: false,
        }
    }
}

/// A type that a kernel takes by value, with the same bytes on host and device.
pub trait Plain: sealed::Sealed {
    /// Its bytes.
    fn to_bytes(&self) -> Vec<u8>;
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! plain {
    ($($number:ty),*) => {$(
        impl sealed::Sealed for $number {}
        impl Plain for $number {
            fn to_bytes(&self) -> Vec<u8> {
                self.to_le_bytes().to_vec()
            }
        }
    )*};
}
plain!(u8, i8, u16, i16, u32, i32, u64, i64, f32, f64);

impl sealed::Sealed for TensorMap {}
impl Plain for TensorMap {
    fn to_bytes(&self) -> Vec<u8> {
        self.bytes().to_vec()
    }
}

/// Arguments in the order of the kernel's parameters.
#[derive(Clone, Debug, Default)]
pub struct Args(Vec<Vec<u8>>);

impl Args {
    /// None yet.
    pub fn new() -> Args {
        Args::default()
    }

    /// The address of a buffer.
    #[must_use]
    pub fn buffer(self, buffer: &Buffer) -> Args {
        self.value(buffer.address())
    }

    /// A number, or a [`TensorMap`] (a `const __grid_constant__ CUtensorMap` of the kernel).
    #[must_use]
    pub fn value(self, value: impl Plain) -> Args {
        self.bytes(&value.to_bytes())
    }

    /// A structure, by its bytes.
    #[must_use]
    pub fn bytes(mut self, bytes: &[u8]) -> Args {
        self.0.push(bytes.to_vec());
        self
    }
}

/// 128 bytes at a multiple of 128: what the strictest parameter (a tensor map) asks for.
#[derive(Clone, Copy)]
#[repr(C, align(128))]
struct Line([u8; 128]);

/// A launch, ready. Make it once and launch it often; change arguments with [`set_arg`](Self::set_arg).
pub struct PreparedLaunch {
    function: Function,
    /// With a null stream: each launch puts in its own. Points to `_attributes`.
    config: sys::CUlaunchConfig,
    _attributes: Box<[sys::CUlaunchAttribute]>,
    /// The argument bytes, each at the parameter's offset.
    block: Box<[Line]>,
    /// Where each argument starts in `block`.
    pointers: Box<[*mut c_void]>,
    lengths: Box<[usize]>,
}

// SAFETY: the pointers point into boxes of this value, which nothing else points to; the handles are
// usable on any thread (see `device::Inner`).
unsafe impl Send for PreparedLaunch {}
// SAFETY: through a shared reference the boxes are only read, by us and by the driver.
unsafe impl Sync for PreparedLaunch {}

impl Function {
    /// Checks shape and arguments against the kernel and the device, and packs them.
    pub fn prepare(&self, shape: &LaunchShape, args: &Args) -> Result<PreparedLaunch> {
        let context = |e: Error| e.with_context(format!("preparing kernel {}", self.name()));
        check_shape(shape, self.attributes()?.max_threads_per_block, self.gpu())
            .map_err(context)?;
        self.allow_smem(shape.smem_bytes)?;
        self.allow_cluster(shape)?;
        let parameters = self.parameters()?;
        check_args(&parameters, args).map_err(context)?;
        let mut attributes = attributes(shape);
        let end = parameters.iter().map(|(offset, size)| offset + size).max().unwrap_or(0);
        let mut block = vec![Line([0; 128]); end.div_ceil(128)].into_boxed_slice();
        let base = block.as_mut_ptr().cast::<u8>();
        let pointers: Box<[*mut c_void]> = parameters
            .iter()
            // SAFETY: the offset is inside the block, which was made long enough above.
            .map(|(offset, _)| unsafe { base.add(*offset) }.cast())
            .collect();
        for (pointer, bytes) in pointers.iter().zip(&args.0) {
            // SAFETY: the bytes are as many as the parameter has, and it is inside the block.
            unsafe { pointer.cast::<u8>().copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        }
        let config = config(shape, &mut attributes);
        let lengths = parameters.iter().map(|(_, size)| *size).collect();
        let function = self.clone();
        Ok(PreparedLaunch { function, config, _attributes: attributes, block, pointers, lengths })
    }

    /// Clusters of more than eight blocks must be asked for.
    fn allow_cluster(&self, shape: &LaunchShape) -> Result<()> {
        if shape.cluster.iter().product::<u32>() > 8 {
            use sys::CUfunction_attribute as A;
            self.set_attribute(A::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
        }
        Ok(())
    }

    /// How many clusters of such a launch the device runs at once; the grid of `shape` does not
    /// count. Blocks without a cluster are clusters of one.
    pub fn max_active_clusters(&self, shape: &LaunchShape) -> Result<u32> {
        let threads = shape.block.iter().product();
        let sm_count = self.gpu().properties().sm_count;
        if shape.cluster == [1; 3] {
            return Ok(self.max_blocks_per_sm(threads, shape.smem_bytes)? * sm_count);
        }
        let [x, y, z] = shape.cluster;
        // A grid that fills the device, in whole clusters.
        let shape = LaunchShape { grid: [x * sm_count, y, z], ..*shape };
        check_shape(&shape, self.attributes()?.max_threads_per_block, self.gpu())?;
        self.allow_smem(shape.smem_bytes)?;
        self.allow_cluster(&shape)?;
        let mut attributes = attributes(&shape);
        let config = config(&shape, &mut attributes);
        let mut clusters: c_int = 0;
        // SAFETY: a place for an int, a function, and a configuration whose attributes are alive.
        let code = unsafe {
            (self.gpu().0.api.occupancy_max_active_clusters)(&mut clusters, self.raw, &config)
        };
        if code == 0 {
            Ok(clusters.unsigned_abs())
        } else {
            Err(self.error(code, "fitting clusters of"))
        }
    }
}

/// The driver's form of a shape, with a null stream. It points to the attributes.
fn config(shape: &LaunchShape, attributes: &mut [sys::CUlaunchAttribute]) -> sys::CUlaunchConfig {
    let [grid_x, grid_y, grid_z] = shape.grid;
    let [block_x, block_y, block_z] = shape.block;
    sys::CUlaunchConfig {
        gridDimX: grid_x,
        gridDimY: grid_y,
        gridDimZ: grid_z,
        blockDimX: block_x,
        blockDimY: block_y,
        blockDimZ: block_z,
        sharedMemBytes: shape.smem_bytes,
        hStream: null_mut(),
        attrs: attributes.as_mut_ptr(),
        numAttrs: attributes.len() as u32,
    }
}

fn attributes(shape: &LaunchShape) -> Box<[sys::CUlaunchAttribute]> {
    use sys::CUlaunchAttributeID as Id;
    let attribute = |id, fill: &dyn Fn(&mut sys::CUlaunchAttributeValue)| {
        let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
        fill(&mut value);
        sys::CUlaunchAttribute { id, pad: [0; 4], value }
    };
    let mut list = Vec::new();
    if shape.cluster != [1; 3] {
        let [x, y, z] = shape.cluster;
        let id = Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        let size = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y, z };
        list.push(attribute(id, &|value| value.clusterDim = size));
    }
    if shape.programmatic {
        let id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        list.push(attribute(id, &|value| value.programmaticStreamSerializationAllowed = 1));
    }
    if shape.cooperative {
        let id = Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
        list.push(attribute(id, &|value| value.cooperative = 1));
    }
    list.into_boxed_slice()
}

/// What the driver would refuse with "invalid value", in words.
fn check_shape(shape: &LaunchShape, max_threads: u32, gpu: &Gpu) -> Result<()> {
    let device = gpu.properties();
    shape_problem(shape, max_threads, device.cluster_launch, device.cooperative_launch)
        .map_or(Ok(()), |problem| Err(Error::bug(problem).with_note(format!("{shape:?}"))))
}

fn shape_problem(
    shape: &LaunchShape,
    max_threads: u32,
    clusters: bool,
    cooperative: bool,
) -> Option<String> {
    let LaunchShape { grid, block, cluster, .. } = shape;
    let threads = block.iter().map(|n| u64::from(*n)).product::<u64>();
    let in_cluster = cluster.iter().map(|n| u64::from(*n)).product::<u64>();
    if grid.contains(&0) || block.contains(&0) || cluster.contains(&0) {
        return Some("a launch needs at least one block of one thread".into());
    }
    if threads > u64::from(max_threads) {
        return Some(format!("{threads} threads per block, and the kernel allows {max_threads}"));
    }
    if grid[0] > i32::MAX as u32 || grid[1] > 65535 || grid[2] > 65535 {
        return Some("more blocks than a grid may have: 2147483647 × 65535 × 65535".into());
    }
    if in_cluster > 1 && !clusters {
        return Some("the device has no clusters".into());
    }
    if in_cluster > 16 || grid.iter().zip(cluster).any(|(grid, cluster)| grid % cluster != 0) {
        return Some("a cluster has at most 16 blocks and divides the grid".into());
    }
    if shape.cooperative && !cooperative {
        return Some("the device has no cooperative launches".into());
    }
    None
}

fn check_args(parameters: &[(usize, usize)], args: &Args) -> Result<()> {
    let (given, wanted) = (args.0.len(), parameters.len());
    if given != wanted {
        return Err(Error::bug(format!("{given} arguments for {wanted} parameters")));
    }
    for (i, ((_, size), bytes)) in parameters.iter().zip(&args.0).enumerate() {
        if bytes.len() != *size {
            let len = bytes.len();
            return Err(Error::bug(format!("argument {i} has {len} bytes, its parameter {size}")));
        }
    }
    Ok(())
}

impl PreparedLaunch {
    /// Puts the launch into the stream, and returns at once: one call of the driver. The error of a
    /// kernel that fails later shows when the stream is waited for.
    ///
    /// # Safety
    /// - The arguments are what the kernel's text expects. Every address in them is valid for what
    ///   it does with it until it has run: buffers are neither dropped nor copied to or from without
    ///   an order between the streams.
    /// - While the stream is recording: the same holds for every launch of the graph, and this
    ///   kernel's module is not unloaded as long as the graph is in use.
    #[inline]
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        let gpu = &stream.0.gpu;
        if !gpu.is(self.function.gpu()) {
            return stream.same_gpu(self.function.gpu());
        }
        gpu.0.ensure_current()?;
        let config = sys::CUlaunchConfig { hStream: stream.0.raw, ..self.config };
        // SAFETY: the configuration, the attributes and the argument block are ours and alive; the
        // argument block has the kernel's sizes; what the kernel does with it is the caller's promise.
        // The driver reads the pointers and what they point to, and writes to neither.
        let code = unsafe {
            (gpu.0.api.launch_kernel)(
                &config,
                self.function.raw,
                self.pointers.as_ptr().cast_mut(),
                null_mut(),
            )
        };
        if code == 0 { Ok(()) } else { Err(self.failed(code)) }
    }

    /// Changes the bytes of an argument, for the launches to come.
    pub fn set_arg(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        let name = self.function.name();
        let Some(len) = self.lengths.get(index) else {
            return Err(Error::bug(format!("kernel {name} has no parameter {index}")));
        };
        if *len != bytes.len() {
            return Err(Error::bug(format!(
                "argument {index} of kernel {name} has {} bytes, its parameter {len}",
                bytes.len()
            )));
        }
        let to = self.pointers[index].cast::<u8>();
        // SAFETY: as many bytes as the parameter has, inside the block, which is borrowed exclusively.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        Ok(())
    }

    /// [`set_arg`](Self::set_arg) with a number or a tensor map.
    pub fn set_value(&mut self, index: usize, value: impl Plain) -> Result<()> {
        self.set_arg(index, &value.to_bytes())
    }

    /// [`set_arg`](Self::set_arg) with a buffer's address.
    pub fn set_buffer(&mut self, index: usize, buffer: &Buffer) -> Result<()> {
        self.set_arg(index, &buffer.address().to_le_bytes())
    }

    /// The kernel.
    pub fn function(&self) -> &Function {
        &self.function
    }

    /// The bytes of each argument, as they are now.
    pub fn args(&self) -> Vec<&[u8]> {
        let of = |(pointer, len): (&*mut c_void, &usize)| {
            // SAFETY: where the argument starts in the block, which this value owns, and as many bytes as the parameter has
            // (`prepare` made the block long enough for all).
            unsafe { std::slice::from_raw_parts(pointer.cast::<u8>(), *len) }
        };
        self.pointers.iter().zip(&self.lengths).map(of).collect()
    }

    /// Bytes of the packed arguments, with the gaps that alignment leaves.
    pub fn args_bytes(&self) -> usize {
        self.block.len() * size_of::<Line>()
    }

    /// How many clusters of this launch the device runs at once.
    pub fn max_active_clusters(&self) -> Result<u32> {
        let gpu = self.function.gpu();
        gpu.make_current()?;
        let mut clusters: c_int = 0;
        // SAFETY: a place for an int, a function, and a configuration whose attributes are alive.
        let code = unsafe {
            (gpu.0.api.occupancy_max_active_clusters)(
                &mut clusters,
                self.function.raw,
                &self.config,
            )
        };
        if code == 0 {
            Ok(clusters.unsigned_abs())
        } else {
            Err(self.function.error(code, "fitting clusters of"))
        }
    }

    /// The driver call of this launch, bare: what a launch is measured against.
    pub fn raw(&self, stream: &Stream) -> RawLaunch<'_> {
        RawLaunch {
            entry: self.function.gpu().0.api.launch_kernel,
            config: sys::CUlaunchConfig { hStream: stream.0.raw, ..self.config },
            launch: self,
        }
    }

    /// The parameters of a kernel node that does the same.
    pub(super) fn node_params(&self) -> sys::CUDA_KERNEL_NODE_PARAMS {
        sys::CUDA_KERNEL_NODE_PARAMS {
            func: self.function.raw,
            gridDimX: self.config.gridDimX,
            gridDimY: self.config.gridDimY,
            gridDimZ: self.config.gridDimZ,
            blockDimX: self.config.blockDimX,
            blockDimY: self.config.blockDimY,
            blockDimZ: self.config.blockDimZ,
            sharedMemBytes: self.config.sharedMemBytes,
            kernelParams: self.pointers.as_ptr().cast_mut(),
            extra: null_mut(),
            kern: null_mut(),
            ctx: null_mut(),
        }
    }

    #[cold]
    fn failed(&self, code: c_int) -> Error {
        let sys::CUlaunchConfig { gridDimX, gridDimY, gridDimZ, .. } = self.config;
        let sys::CUlaunchConfig { blockDimX, blockDimY, blockDimZ, sharedMemBytes, .. } =
            self.config;
        self.function.error(code, "launching").with_note(format!(
            "grid {gridDimX} × {gridDimY} × {gridDimZ}, block {blockDimX} × {blockDimY} × {blockDimZ}, {sharedMemBytes} bytes of dynamic shared memory"
        ))
    }
}

impl fmt::Debug for PreparedLaunch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sys::CUlaunchConfig { gridDimX, gridDimY, gridDimZ, .. } = self.config;
        let grid = [gridDimX, gridDimY, gridDimZ];
        write!(f, "PreparedLaunch({}, grid {grid:?})", self.function.name())
    }
}

/// The bare driver call of a [`PreparedLaunch`].
pub struct RawLaunch<'a> {
    entry: unsafe extern "C" fn(
        *const sys::CUlaunchConfig,
        sys::CUfunction,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> c_int,
    config: sys::CUlaunchConfig,
    launch: &'a PreparedLaunch,
}

impl RawLaunch<'_> {
    /// The driver's result code.
    ///
    /// # Safety
    /// As for [`PreparedLaunch::launch`]; the stream it was made for is alive, and its device's
    /// context is current (it is after any use of the stream on this thread).
    #[inline(always)]
    pub unsafe fn call(&self) -> i32 {
        // SAFETY: as in `PreparedLaunch::launch`.
        unsafe {
            (self.entry)(
                &self.config,
                self.launch.function.raw,
                self.launch.pointers.as_ptr().cast_mut(),
                null_mut(),
            )
        }
    }
}

impl fmt::Debug for RawLaunch<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RawLaunch({:?})", self.launch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_that_no_device_takes_are_named() {
        let shape = LaunchShape { grid: [8, 1, 1], block: [128, 1, 1], ..LaunchShape::default() };
        let problem = |shape: LaunchShape| shape_problem(&shape, 1024, true, true);
        assert_eq!(problem(shape), None);
        assert_eq!(problem(LaunchShape { cluster: [4, 1, 1], ..shape }), None);
        let wrong = [
            LaunchShape { grid: [0, 1, 1], ..shape },
            LaunchShape { grid: [1, 65536, 1], ..shape },
            LaunchShape { block: [1025, 1, 1], ..shape },
            LaunchShape { block: [u32::MAX; 3], ..shape },
            LaunchShape { cluster: [3, 1, 1], ..shape },
            LaunchShape { grid: [32, 1, 1], cluster: [32, 1, 1], ..shape },
        ];
        for shape in wrong {
            assert!(problem(shape).is_some(), "{shape:?}");
        }
        let clustered = LaunchShape { cluster: [2, 1, 1], ..shape };
        assert!(shape_problem(&clustered, 1024, false, true).is_some());
        assert!(
            shape_problem(&LaunchShape { cooperative: true, ..shape }, 1024, true, false).is_some()
        );
    }

    #[test]
    fn arguments_must_fit_the_parameters() {
        let parameters = [(0, 8), (8, 4)];
        let fits = Args::new().value(0u64).value(1.5f32);
        assert!(check_args(&parameters, &fits).is_ok());
        let error = check_args(&parameters, &Args::new().value(0u64)).unwrap_err();
        assert!(error.message().contains("1 arguments for 2"));
        let error = check_args(&parameters, &Args::new().value(0u64).value(1.5f64)).unwrap_err();
        assert!(error.message().contains("argument 1 has 8 bytes, its parameter 4"));
    }

    #[test]
    fn attributes_are_those_of_the_shape() {
        let ids = |shape: &LaunchShape| attributes(shape).iter().map(|a| a.id).collect::<Vec<_>>();
        assert!(ids(&LaunchShape::default()).is_empty());
        let all = LaunchShape {
            cluster: [2, 1, 1],
            programmatic: true,
            cooperative: true,
            ..LaunchShape::default()
        };
        use sys::CUlaunchAttributeID as Id;
        assert_eq!(
            ids(&all),
            [
                Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION,
                Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                Id::CU_LAUNCH_ATTRIBUTE_COOPERATIVE
            ]
        );
        assert_eq!(
            (size_of::<sys::CUlaunchAttribute>(), size_of::<sys::CUlaunchConfig>()),
            (72, 56)
        );
    }
}
