//! The driver on a real device. Without one, each test says that it was skipped; with
//! `TILEWRIGHT_REQUIRE_GPU=1` it fails instead. That the kernels compile is tested without a GPU.

use std::process::Command;
use std::sync::OnceLock;
use tilewright_base::{DType, Error, Kind, Result};
use tilewright_cuda::{
    Arch, Args, Buffer, CompileRequest, Compiled, Event, Function, Gpu, L2Promotion, LaunchShape,
    MapElement, Nvrtc, OobFill, PinnedBuffer, Stream, Swizzle, TensorMap, TensorMapSpec,
    driver_version,
};
use tilewright_data::Tensor;

/// One module with all kernels, so that it is compiled once.
const KERNELS: &str = r#"
extern "C" __global__ void add(float* a, const float* b, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) a[i] += b[i];
}
extern "C" __global__ void misaligned(float4* p) { *p = make_float4(1, 2, 3, 4); }
extern "C" __global__ void spin(unsigned long long ns) {
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < ns);
}
extern "C" __global__ void reverse(float* a, int n) {
    extern __shared__ float staged[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) staged[i] = a[i];
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) a[i] = staged[n - 1 - i];
}
// Every block waits until all have arrived: only a launch with all blocks at once ends.
extern "C" __global__ void meet(unsigned* arrived, unsigned* seen) {
    if (threadIdx.x == 0) {
        atomicAdd(arrived, 1);
        while (atomicAdd(arrived, 0) < gridDim.x) {}
        seen[blockIdx.x] = atomicAdd(arrived, 0);
    }
}
"#;

/// What needs Hopper.
const HOPPER_KERNELS: &str = r#"
struct alignas(64) Map { char bytes[128]; };
__device__ unsigned shared_address(const void* p) {
    return (unsigned)__cvta_generic_to_shared(p);
}
// A box of 16 rows of 32 floats, as it lies in shared memory.
extern "C" __global__ void fetch(const __grid_constant__ Map map, float* out, int x, int y) {
    __shared__ alignas(1024) float box[512];
    __shared__ alignas(8) unsigned long long barrier;
    unsigned at = shared_address(&barrier), done = 0;
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(at) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                     :: "r"(at), "r"(2048) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                     "[%0], [%1, {%2, %3}], [%4];"
                     :: "r"(shared_address(box)), "l"(&map), "r"(x), "r"(y), "r"(at) : "memory");
    }
    while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; "
                     "selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(at) : "memory");
    }
    for (int i = threadIdx.x; i < 512; i += blockDim.x) out[i] = box[i];
}
// The first of two that overlap: lets the second start, works, and writes at its end.
extern "C" __global__ void produce(int* value) {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    unsigned long long start, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(start));
    do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - start < 200000);
    if (threadIdx.x == 0) *value = 42;
}
extern "C" __global__ void consume(const int* value, int* out) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
    if (threadIdx.x == 0) *out = *value;
}
// Each block reads the number of the next one of its cluster.
extern "C" __global__ void neighbour(unsigned* out) {
    __shared__ unsigned mine;
    unsigned rank, blocks, at, value;
    asm volatile("mov.u32 %0, %cluster_ctarank;" : "=r"(rank));
    asm volatile("mov.u32 %0, %cluster_nctarank;" : "=r"(blocks));
    mine = blockIdx.x;
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(at) : "r"(shared_address(&mine)), "r"((rank + 1) % blocks));
    asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(value) : "r"(at) : "memory");
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
    out[blockIdx.x] = value;
}
"#;

/// The device, or `None` when there is none.
fn gpu() -> Option<Gpu> {
    static GPU: OnceLock<Option<Gpu>> = OnceLock::new();
    GPU.get_or_init(|| match Gpu::open(0) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            assert!(!required("TILEWRIGHT_REQUIRE_GPU"), "{error:?}");
            None
        }
    })
    .clone()
    .or_else(|| {
        println!("skipped: no device");
        None
    })
}

fn hopper() -> Option<Gpu> {
    let gpu = gpu()?;
    if gpu.properties().major < 9 {
        println!("skipped: the device is older than Hopper");
        return None;
    }
    Some(gpu)
}

fn required(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|v| v == "1")
}

fn compile(text: &str, arch: Arch) -> Result<Compiled> {
    Nvrtc::open(None)?.compile(&CompileRequest::new("gpu_tests", text, arch))
}

fn function(gpu: &Gpu, text: &str, name: &str) -> Function {
    gpu.load(&compile(text, gpu.arch()).unwrap()).unwrap().function(name).unwrap()
}

fn floats(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

fn read_floats(buffer: &Buffer, stream: &Stream) -> Vec<f32> {
    let bytes = buffer.to_vec(stream).unwrap();
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn read_ints(buffer: &Buffer, stream: &Stream) -> Vec<u32> {
    let bytes = buffer.to_vec(stream).unwrap();
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}

fn shape(blocks: u32, threads: u32) -> LaunchShape {
    LaunchShape { grid: [blocks, 1, 1], block: [threads, 1, 1], ..LaunchShape::default() }
}

#[test]
fn the_kernels_of_these_tests_compile() {
    if let Err(error) = Nvrtc::open(None) {
        assert!(!required("TILEWRIGHT_REQUIRE_NVRTC"), "{error:?}");
        println!("skipped: no NVRTC");
        return;
    }
    let both = format!("{KERNELS}{HOPPER_KERNELS}");
    for (text, arch, kernels) in [(KERNELS, Arch::SM_80, 5), (&both, Arch::SM_90A, 9)] {
        let compiled = compile(text, arch).unwrap();
        assert_eq!(compiled.functions.iter().filter(|f| f.is_kernel).count(), kernels);
        assert_eq!(compiled.warnings, []);
    }
}

#[test]
fn without_a_driver_or_a_device_there_is_an_error() {
    match Gpu::count() {
        Err(error) => {
            assert_eq!(error.kind(), Kind::Unsupported);
            assert!(error.hint().is_some(), "{error:?}");
            assert_eq!(Gpu::open(0).unwrap_err().message(), error.message());
            assert!(driver_version().is_err() && Gpu::open_all().is_err());
        }
        Ok(0) => assert_eq!(Gpu::open(0).unwrap_err().kind(), Kind::Unsupported),
        Ok(count) => {
            let error = Gpu::open(count).unwrap_err();
            assert_eq!(error.kind(), Kind::User);
            assert_eq!(error.message(), format!("there is no GPU {count}"));
            assert!(driver_version().unwrap() >= (12, 8));
        }
    }
}

#[test]
fn the_device_describes_itself() {
    let Some(gpu) = gpu() else { return };
    let properties = gpu.properties();
    println!("{properties:#?}");
    assert!(properties.sm_count > 0 && properties.memory_bytes > 1 << 30);
    assert!(properties.smem_per_block_optin_bytes >= 48 << 10);
    assert!(gpu.arch().runs_on(properties.major, properties.minor));
    let memory = gpu.memory().unwrap();
    assert!(memory.free_bytes > 0 && memory.free_bytes <= memory.total_bytes);
    assert_eq!(Gpu::open_all().unwrap().len(), Gpu::count().unwrap() as usize);
}

#[test]
fn vectors_are_added_and_arguments_change() {
    let Some(gpu) = gpu() else { return };
    let add = function(&gpu, KERNELS, "add");
    let stream = gpu.stream().unwrap();
    let n = 1000usize;
    let a = stream.upload(&floats((0..n).map(|i| i as f32))).unwrap();
    let b = stream.upload(&floats((0..n).map(|i| 0.5 * i as f32))).unwrap();
    let args = Args::new().buffer(&a).buffer(&b).value(n as i32);
    let mut launch = add.prepare(&shape(4, 256), &args).unwrap();
    // SAFETY: two buffers of `n` floats and their number, alive until the read below.
    unsafe { launch.launch(&stream).unwrap() };
    let want: Vec<f32> = (0..n).map(|i| 1.5 * i as f32).collect();
    assert_eq!(read_floats(&a, &stream), want);
    // Half of the elements, from a thread that never used the device.
    launch.set_value(2, 500i32).unwrap();
    std::thread::scope(|scope| {
        // SAFETY: as above.
        scope.spawn(|| unsafe { launch.launch(&stream).unwrap() });
    });
    let want: Vec<f32> = (0..n).map(|i| if i < 500 { 2.0 } else { 1.5 } * i as f32).collect();
    assert_eq!(read_floats(&a, &stream), want);
    let attributes = add.attributes().unwrap();
    assert!(attributes.registers > 0 && attributes.local_bytes == 0, "{attributes:?}");
    assert!(add.max_blocks_per_sm(256, 0).unwrap() >= 1);
    // What does not fit the kernel is said before anything runs.
    assert!(launch.set_value(2, 500i64).unwrap_err().message().contains("8 bytes"));
    assert!(launch.set_value(3, 500i32).unwrap_err().message().contains("no parameter 3"));
    let few = add.prepare(&shape(4, 256), &Args::new().buffer(&a)).unwrap_err();
    assert!(few.message().contains("1 arguments for 3 parameters"), "{few:?}");
    let wide = add.prepare(&shape(4, 2048), &args).unwrap_err();
    assert!(wide.message().contains("2048 threads"), "{wide:?}");
}

#[test]
fn copies_fills_and_tensors() {
    let Some(gpu) = gpu() else { return };
    let stream = gpu.stream().unwrap();
    let a = stream.alloc(1000).unwrap();
    assert_eq!(a.address() % 256, 0);
    a.poison(&stream).unwrap();
    assert_eq!(a.to_vec(&stream).unwrap(), vec![0xff; 1000]);
    a.zero(&stream).unwrap();
    let b = stream.upload(&[7; 1000]).unwrap();
    a.copy_from(&stream, &b).unwrap();
    assert_eq!(a.to_vec(&stream).unwrap(), vec![7; 1000]);
    assert!(a.copy_from(&stream, &stream.alloc(10).unwrap()).is_err());
    assert!(stream.alloc(0).unwrap().to_vec(&stream).unwrap().is_empty());
    let tensor = Tensor::from_f64s(DType::F16, &[2, 3], &[1., 2., 3., 4., 5., 6.]).unwrap();
    let there = Buffer::of_tensor(&stream, &tensor).unwrap();
    let back = there.to_tensor(&stream, DType::F16, &[2, 3]).unwrap();
    assert_eq!(back.to_f64s(), tensor.to_f64s());
    let mut pinned = PinnedBuffer::zeroed(&gpu, 1000).unwrap();
    pinned.bytes_mut().fill(9);
    let mut answer = PinnedBuffer::zeroed(&gpu, 1000).unwrap();
    // SAFETY: both are left alone until the stream is done.
    unsafe {
        a.write_async(&stream, &pinned).unwrap();
        a.read_async(&stream, &mut answer).unwrap();
    }
    stream.synchronize().unwrap();
    assert_eq!(answer.bytes(), [9; 1000]);
    gpu.trim(0).unwrap();
}

#[test]
fn dynamic_shared_memory_above_48_kib() {
    let Some(gpu) = gpu() else { return };
    let reverse = function(&gpu, KERNELS, "reverse");
    let stream = gpu.stream().unwrap();
    let n = 20_000usize;
    let a = stream.upload(&floats((0..n).map(|i| i as f32))).unwrap();
    let shape = LaunchShape { smem_bytes: 80_000, ..shape(1, 256) };
    let launch = reverse.prepare(&shape, &Args::new().buffer(&a).value(n as i32)).unwrap();
    // SAFETY: a buffer of `n` floats and shared memory for as many.
    unsafe { launch.launch(&stream).unwrap() };
    assert_eq!(read_floats(&a, &stream), (0..n).rev().map(|i| i as f32).collect::<Vec<_>>());
    let shape = LaunchShape { smem_bytes: 1 << 20, ..shape };
    let error = reverse.prepare(&shape, &Args::new().buffer(&a).value(n as i32)).unwrap_err();
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.message().contains("1048576 + 0 bytes of shared memory"), "{error:?}");
}

#[test]
fn memory_that_does_not_suffice() {
    let Some(gpu) = gpu() else { return };
    let stream = gpu.stream().unwrap();
    let total = gpu.memory().unwrap().total_bytes;
    let error = stream.alloc_planned(2 * total as usize, 3 * total).unwrap_err();
    let text = format!("{error:?}");
    println!("{text}");
    assert_eq!(error.kind(), Kind::Unsupported);
    for words in ["out of memory on Gpu(0", "asked for", "MiB free of", "planned in all"] {
        assert!(text.contains(words), "{words}: {text}");
    }
    // The device works on.
    assert_eq!(stream.upload(&[1, 2, 3]).unwrap().to_vec(&stream).unwrap(), [1, 2, 3]);
}

#[test]
fn code_for_another_device_and_missing_kernels() {
    let Some(gpu) = gpu() else { return };
    let ampere = gpu.properties().major == 8;
    let other = if ampere { Arch::SM_90A } else { Arch::SM_80 };
    let compiled = compile(KERNELS, other).unwrap();
    let mut errors = vec![gpu.load_cubin("other", compiled.cubin()).unwrap_err()];
    if ampere {
        errors.push(gpu.load(&compiled).unwrap_err());
    } else {
        // Machine code does not run there; the driver translates the text that it was made from.
        assert!(gpu.load(&compiled).unwrap().function("add").is_ok());
    }
    for error in errors {
        assert_eq!(error.kind(), Kind::Unsupported);
        let plain = other.to_string().trim_end_matches('a').to_owned();
        assert!(error.message().contains(&format!("built for {plain}")), "{error:?}");
        assert!(error.hint().unwrap().contains(&gpu.arch().to_string()), "{error:?}");
    }
    assert_eq!(gpu.load_cubin("text", b"no cubin").unwrap_err().kind(), Kind::User);
    let module = gpu.load(&compile(KERNELS, gpu.arch()).unwrap()).unwrap();
    let error = module.function("subtract").unwrap_err();
    assert!(error.notes()[0].contains("add"), "{error:?}");
}

/// A fault makes the device useless for its process, so it is made in another one: this program
/// again, with only this test.
#[test]
fn a_misaligned_address_is_named() {
    const CHILD: &str = "TILEWRIGHT_TEST_MISALIGNED";
    let Some(gpu) = gpu() else { return };
    if std::env::var_os(CHILD).is_none() {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_misaligned_address_is_named", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(text.contains("misaligned address (CUDA_ERROR_MISALIGNED_ADDRESS)"), "{text}");
        assert!(text.contains("CUDA_LAUNCH_BLOCKING=1"), "{text}");
        return;
    }
    let misaligned = function(&gpu, KERNELS, "misaligned");
    let stream = gpu.stream().unwrap();
    let buffer = stream.alloc(64).unwrap();
    let args = Args::new().value(buffer.address() + 4);
    let launch = misaligned.prepare(&shape(1, 1), &args).unwrap();
    // SAFETY: inside the buffer; the device refuses the address.
    let result: Result<()> = unsafe { launch.launch(&stream) }.and_then(|()| stream.synchronize());
    let error: Error = result.unwrap_err();
    assert_eq!(error.kind(), Kind::Bug);
    println!("{error:?}");
}

#[test]
fn events_tell_the_time_and_order_streams() {
    let Some(gpu) = gpu() else { return };
    let spin = function(&gpu, KERNELS, "spin");
    let stream = gpu.stream().unwrap();
    let launch = spin.prepare(&shape(1, 1), &Args::new().value(2_000_000u64)).unwrap();
    // SAFETY: the kernel touches no memory.
    let us = stream.time_us(|stream| unsafe { launch.launch(stream) }).unwrap();
    assert!((1_900.0..1_000_000.0).contains(&us), "2 ms by the device's clock took {us} us");
    // A copy on a second stream, after a slow fill on the first.
    let buffer = stream.upload(&[1; 1024]).unwrap();
    let target = stream.upload(&[2; 1024]).unwrap();
    let other = gpu.stream().unwrap();
    // SAFETY: as above.
    unsafe { launch.launch(&stream).unwrap() };
    buffer.fill(&stream, 3).unwrap();
    let done = stream.record().unwrap();
    other.wait(&done).unwrap();
    target.copy_from(&other, &buffer).unwrap();
    assert_eq!(target.to_vec(&other).unwrap(), vec![3; 1024]);
    let never = Event::new(&gpu).unwrap();
    assert!(done.since_us(&never).is_err());
}

#[test]
fn graphs_are_recorded_replayed_and_changed() {
    let Some(gpu) = gpu() else { return };
    let add = function(&gpu, KERNELS, "add");
    let stream = gpu.stream().unwrap();
    let n = 256usize;
    let a = stream.upload(&floats(vec![0.0; n])).unwrap();
    let one = stream.upload(&floats(vec![1.0; n])).unwrap();
    let ten = stream.upload(&floats(vec![10.0; n])).unwrap();
    let prepare = |b: &Buffer| {
        add.prepare(&shape(1, 256), &Args::new().buffer(&a).buffer(b).value(n as i32)).unwrap()
    };
    let (add_one, add_ten) = (prepare(&one), prepare(&ten));
    // SAFETY (all launches of this test): `n` floats each, alive to its end, on one stream.
    let record = |list: &[&tilewright_cuda::PreparedLaunch]| {
        stream.capture(|stream| {
            // SAFETY: see above.
            list.iter().try_for_each(|launch| unsafe { launch.launch(stream) })
        })
    };
    let graph = record(&[&add_one, &add_one, &add_ten]).unwrap();
    assert_eq!(read_floats(&a, &stream), vec![0.0; n], "recording runs nothing");
    let mut exec = graph.instantiate().unwrap();
    for want in [12.0, 24.0] {
        // SAFETY: see above.
        unsafe { exec.launch(&stream).unwrap() };
        assert_eq!(read_floats(&a, &stream), vec![want; n]);
    }
    // Another recording with the same structure, taken over.
    exec.update(&record(&[&add_one, &add_one, &add_one]).unwrap()).unwrap();
    // SAFETY: see above.
    unsafe { exec.launch(&stream).unwrap() };
    assert_eq!(read_floats(&a, &stream), vec![27.0; n]);
    // One kernel changed in place.
    let nodes = graph.kernel_nodes().unwrap();
    let names: Vec<&str> = nodes.iter().map(|node| node.name()).collect();
    assert_eq!(names, ["add"; 3]);
    exec.set_kernel(&nodes[0], &add_ten).unwrap();
    // SAFETY: see above.
    unsafe { exec.launch(&stream).unwrap() };
    assert_eq!(read_floats(&a, &stream), vec![39.0; n]);
    // A node of another graph, and a graph of another structure.
    let two = record(&[&add_one, &add_one]).unwrap();
    assert!(exec.set_kernel(&two.kernel_nodes().unwrap()[0], &add_one).is_err());
    let error = exec.update(&two).unwrap_err();
    assert!(error.notes().iter().any(|note| note.contains("different nodes")), "{error:?}");
}

#[test]
fn what_cannot_be_recorded_is_named() {
    let Some(gpu) = gpu() else { return };
    let stream = gpu.stream().unwrap();
    let error = stream.capture(|stream| stream.alloc(64).map(drop)).unwrap_err();
    assert!(format!("{error}").contains("memory was asked for while recording"), "{error:?}");
    let error = stream.capture(Stream::synchronize).unwrap_err();
    assert!(error.message().contains("cannot be recorded"), "{error:?}");
    // A buffer that is dropped while recording is freed afterwards.
    let buffer = stream.upload(&[5; 64]).unwrap();
    let other = stream.upload(&[6; 64]).unwrap();
    let graph = stream
        .capture(|stream| {
            drop(buffer);
            other.fill(stream, 8)
        })
        .unwrap();
    // SAFETY: the one recorded operation is on a buffer that is alive.
    unsafe { graph.instantiate().unwrap().launch(&stream).unwrap() };
    assert_eq!(other.to_vec(&stream).unwrap(), [8; 64]);
    assert!(!stream.is_capturing().unwrap());
}

#[test]
fn a_cooperative_launch_runs_all_blocks_at_once() {
    let Some(gpu) = gpu() else { return };
    let meet = function(&gpu, KERNELS, "meet");
    let stream = gpu.stream().unwrap();
    let blocks = gpu.properties().sm_count;
    let arrived = stream.upload(&[0; 4]).unwrap();
    let seen = stream.alloc(4 * blocks as usize).unwrap();
    let shape = LaunchShape { cooperative: true, ..shape(blocks, 32) };
    let launch = meet.prepare(&shape, &Args::new().buffer(&arrived).buffer(&seen)).unwrap();
    // SAFETY: a counter and a place for each block.
    unsafe { launch.launch(&stream).unwrap() };
    assert_eq!(read_ints(&seen, &stream), vec![blocks; blocks as usize]);
    let error = {
        let shape = LaunchShape { grid: [1 << 20, 1, 1], ..shape };
        let launch = meet.prepare(&shape, &Args::new().buffer(&arrived).buffer(&seen)).unwrap();
        // SAFETY: refused, because so many blocks do not fit.
        unsafe { launch.launch(&stream).unwrap_err() }
    };
    assert!(error.message().contains("more blocks than fit"), "{error:?}");
    assert!(error.notes().iter().any(|note| note.contains("kernel.cu")), "{error:?}");
}

/// A matrix of 50 × 48 floats, read in a box of 16 × 32 that reaches over two of its edges.
#[test]
fn a_tensor_map_fetches_a_box() {
    let Some(gpu) = hopper() else { return };
    let fetch = function(&gpu, HOPPER_KERNELS, "fetch");
    let stream = gpu.stream().unwrap();
    let (rows, columns) = (50i32, 48i32);
    let value = |row: i32, column: i32| {
        let inside = (0..rows).contains(&row) && (0..columns).contains(&column);
        if inside { (1 + row * columns + column) as f32 } else { 0.0 }
    };
    let matrix = (0..rows).flat_map(|r| (0..columns).map(move |c| value(r, c)));
    let matrix = stream.upload(&floats(matrix)).unwrap();
    let out = stream.alloc(2048).unwrap();
    let (x, y) = (32, -2);
    for swizzle in [Swizzle::None, Swizzle::B128] {
        let spec = TensorMapSpec {
            windows: None,
            element: MapElement::of(DType::F32).unwrap(),
            address: matrix.address(),
            sizes: vec![columns as u64, rows as u64],
            strides_bytes: vec![4 * columns as u64],
            box_sizes: vec![32, 16],
            element_strides: vec![1, 1],
            swizzle,
            l2_promotion: L2Promotion::B128,
            oob_fill: OobFill::Zero,
        };
        assert_eq!(spec.box_bytes(), 2048);
        let map = TensorMap::encode(&gpu, &spec).unwrap();
        let args = Args::new().value(map).buffer(&out).value(x).value(y);
        let launch = fetch.prepare(&shape(1, 128), &args).unwrap();
        out.poison(&stream).unwrap();
        // SAFETY: a map of a matrix that is alive, and room for a box.
        unsafe { launch.launch(&stream).unwrap() };
        let got = read_floats(&out, &stream);
        for row in 0..16 {
            for column in 0..32 {
                // Pieces of 16 bytes change places within 128: by the row's number modulo 8.
                let piece = match swizzle {
                    Swizzle::None => column / 4,
                    _ => (column / 4) ^ (row % 8),
                };
                let at = (row * 32 + piece * 4 + column % 4) as usize;
                let want = value(y + row, x + column);
                assert_eq!(got[at], want, "{swizzle:?}: row {row}, column {column}");
            }
        }
        let error = TensorMap::encode(&gpu, &TensorMapSpec { address: 8, ..spec }).unwrap_err();
        assert!(error.message().contains("multiple of 16"), "{error:?}");
    }
}

#[test]
fn a_dependent_launch_waits_for_what_it_reads() {
    let Some(gpu) = hopper() else { return };
    let module = gpu.load(&compile(HOPPER_KERNELS, gpu.arch()).unwrap()).unwrap();
    let stream = gpu.stream().unwrap();
    let value = stream.upload(&[0; 4]).unwrap();
    let out = stream.upload(&[0; 4]).unwrap();
    let produce = module.function("produce").unwrap();
    let consume = module.function("consume").unwrap();
    let first = produce.prepare(&shape(1, 32), &Args::new().buffer(&value)).unwrap();
    let dependent = LaunchShape { programmatic: true, ..shape(1, 32) };
    let args = Args::new().buffer(&value).buffer(&out);
    let second = consume.prepare(&dependent, &args).unwrap();
    for _ in 0..10 {
        value.zero(&stream).unwrap();
        out.zero(&stream).unwrap();
        // SAFETY: one int each; the second waits for the first by `griddepcontrol.wait`.
        unsafe {
            first.launch(&stream).unwrap();
            second.launch(&stream).unwrap();
        }
        assert_eq!(read_ints(&out, &stream), [42]);
    }
    // The same, recorded.
    // SAFETY: as above.
    let graph = stream
        .capture(|stream| unsafe { first.launch(stream).and_then(|()| second.launch(stream)) })
        .unwrap();
    out.zero(&stream).unwrap();
    // SAFETY: as above.
    unsafe { graph.instantiate().unwrap().launch(&stream).unwrap() };
    assert_eq!(read_ints(&out, &stream), [42]);
}

#[test]
fn blocks_of_a_cluster_read_each_other() {
    let Some(gpu) = hopper() else { return };
    let neighbour = function(&gpu, HOPPER_KERNELS, "neighbour");
    let stream = gpu.stream().unwrap();
    let out = stream.alloc(4 * 16).unwrap();
    for size in [2u32, 4, 8, 16] {
        let shape = LaunchShape { cluster: [size, 1, 1], ..shape(16, 32) };
        let launch = neighbour.prepare(&shape, &Args::new().buffer(&out)).unwrap();
        assert!(launch.max_active_clusters().unwrap() >= 1, "clusters of {size}");
        // SAFETY: a place for each block.
        unsafe { launch.launch(&stream).unwrap() };
        let want: Vec<u32> = (0..16).map(|i| i / size * size + (i + 1) % size).collect();
        assert_eq!(read_ints(&out, &stream), want, "clusters of {size}");
    }
    let shape = LaunchShape { cluster: [3, 1, 1], ..shape(16, 32) };
    let error = neighbour.prepare(&shape, &Args::new().buffer(&out)).unwrap_err();
    assert!(error.message().contains("divides the grid"), "{error:?}");
}
