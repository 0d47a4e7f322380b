//! [`Gpu`]: a device with its context and its pool of memory.

use super::api::{Api, api};
use super::stream::Stream;
use crate::Arch;
use cudarc::driver::sys;
use serde::{Deserialize, Serialize};
use std::cell::Cell;
use std::ffi::c_int;
use std::fmt;
use std::ptr::null_mut;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tilewright_base::{Error, Result};

/// What a device is, as plain data. Sizes in bytes, clocks in kHz.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct Properties {
    pub ordinal: u32,
    pub name: String,
    /// Compute capability: 9 of 9.0.
    pub major: u32,
    pub minor: u32,
    pub memory_bytes: u64,
    pub l2_bytes: u64,
    /// Streaming multiprocessors.
    pub sm_count: u32,
    pub smem_per_sm_bytes: u32,
    /// The most a block may have, after asking for it.
    pub smem_per_block_optin_bytes: u32,
    /// What the system takes of a block's shared memory.
    pub smem_reserved_per_block_bytes: u32,
    pub registers_per_sm: u32,
    pub registers_per_block: u32,
    pub threads_per_sm: u32,
    pub threads_per_block: u32,
    pub blocks_per_sm: u32,
    pub clock_khz: u32,
    pub memory_clock_khz: u32,
    pub memory_bus_bits: u32,
    /// Clusters of blocks, and the tensor memory accelerator's maps.
    pub cluster_launch: bool,
    pub cooperative_launch: bool,
    pub ecc: bool,
    /// Bus, device and domain of the PCI bus: how other tools name the device.
    pub pci: (u32, u32, u32),
}

impl Properties {
    /// The architecture to compile for.
    pub fn arch(&self) -> Arch {
        Arch::of_device(self.major, self.minor)
    }
}

/// Memory of a device at this moment, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// Free for any process.
    pub free_bytes: u64,
    /// All there is.
    pub total_bytes: u64,
    /// Held by our pool: used by buffers, or kept for the next ones.
    pub pool_bytes: u64,
    /// Of those, used by buffers.
    pub used_bytes: u64,
}

/// A device, open. Cheap to clone; the device is closed when the last clone, and the last thing made
/// from it, is gone.
#[derive(Clone)]
pub struct Gpu(pub(super) Arc<Inner>);

pub(super) struct Inner {
    pub(super) api: &'static Api,
    device: sys::CUdevice,
    pub(super) context: sys::CUcontext,
    /// Tells this opening of the device from an earlier one, which may have had the same address.
    id: u64,
    pub(super) pool: sys::CUmemoryPool,
    properties: Properties,
}

// SAFETY: the fields are data and handles. The driver may be called from any thread, and its handles
// mean the same on all of them, as long as the context is current, which every call sees to.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing changes after the construction.
unsafe impl Sync for Inner {}

static NEXT_ID: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The [`Inner::id`] whose context we last made current on this thread; 0 for none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

impl Gpu {
    /// How many devices there are. `CUDA_VISIBLE_DEVICES` decides which.
    pub fn count() -> Result<u32> {
        let api = api()?;
        let mut count = 0;
        // SAFETY: a place for an int.
        let code = unsafe { (api.device_get_count)(&mut count) };
        api.check(code, "counting devices")?;
        Ok(count.unsigned_abs())
    }

    /// Opens a device by its number, from 0.
    pub fn open(ordinal: u32) -> Result<Gpu> {
        let api = api()?;
        let count = Gpu::count()?;
        if count == 0 {
            return Err(Error::unsupported("no NVIDIA GPU is present")
                .with_hint("an empty CUDA_VISIBLE_DEVICES hides all devices"));
        }
        if ordinal >= count {
            return Err(Error::user(format!("there is no GPU {ordinal}"))
                .with_note(format!("there are {count}, counted from 0")));
        }
        let mut device = 0;
        // SAFETY: a place for the device; the number is one of the counted.
        let code = unsafe { (api.device_get)(&mut device, ordinal.cast_signed()) };
        api.check(code, "opening a GPU")?;
        let properties = properties(api, ordinal, device)?;
        let mut context = null_mut();
        // SAFETY: a place for the context; released when `Inner` is dropped.
        let code = unsafe { (api.primary_ctx_retain)(&mut context, device) };
        api.check(code, "opening a GPU")?;
        // From here on `Inner::drop` gives back what there is.
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        let mut inner = Inner { api, device, context, id, pool: null_mut(), properties };
        inner.make_current()?;
        inner.pool = inner.new_pool(ordinal)?;
        Ok(Gpu(Arc::new(inner)))
    }

    /// Opens every device.
    pub fn open_all() -> Result<Vec<Gpu>> {
        (0..Gpu::count()?).map(Gpu::open).collect()
    }

    /// What the device is.
    pub fn properties(&self) -> &Properties {
        &self.0.properties
    }

    /// The architecture to compile for.
    pub fn arch(&self) -> Arch {
        self.0.properties.arch()
    }

    /// A new queue of work.
    pub fn stream(&self) -> Result<Stream> {
        Stream::new(self)
    }

    /// Waits until the device has done everything, of all streams.
    pub fn synchronize(&self) -> Result<()> {
        self.0.make_current()?;
        // SAFETY: the context is current.
        let code = unsafe { (self.0.api.ctx_synchronize)() };
        self.0.api.check(code, "waiting for the device")
    }

    /// Does what may not be part of a recording (allocating, waiting for another stream) in a thread that may be recording
    /// somebody's stream: it happens now, and the recording goes on without it. `work` leaves that stream alone.
    ///
    /// # Errors
    /// Those of `work`; the driver's.
    pub fn beside_recordings<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        self.0.make_current()?;
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        let mut exchange = || {
            // SAFETY: a place for the thread's mode, which gets the one that it had.
            let code = unsafe { (self.0.api.thread_exchange_stream_capture_mode)(&mut mode) };
            self.0.api.check(code, "changing what a recording forbids")
        };
        exchange()?;
        let result = work();
        exchange()?;
        result
    }

    /// Memory at this moment.
    pub fn memory(&self) -> Result<DeviceMemory> {
        self.0.make_current()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: two places for sizes; the context is current.
        let code = unsafe { (self.0.api.mem_get_info)(&mut free, &mut total) };
        self.0.api.check(code, "asking for free memory")?;
        use sys::CUmemPool_attribute as A;
        Ok(DeviceMemory {
            free_bytes: free as u64,
            total_bytes: total as u64,
            pool_bytes: self.0.pool_attribute(A::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT)?,
            used_bytes: self.0.pool_attribute(A::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        })
    }

    /// Gives memory that no buffer uses back to the system, down to `keep_bytes`.
    pub fn trim(&self, keep_bytes: usize) -> Result<()> {
        self.0.make_current()?;
        // SAFETY: our pool; only memory that is free in it is given back.
        let code = unsafe { (self.0.api.mem_pool_trim_to)(self.0.pool, keep_bytes) };
        self.0.api.check(code, "giving back memory")
    }

    /// Makes the device's context current on this thread. Needed only when another library of this
    /// process (with a device of its own) changed it between two launches on this thread.
    pub fn make_current(&self) -> Result<()> {
        self.0.make_current()
    }

    /// Whether two are the same device.
    pub(super) fn is(&self, other: &Gpu) -> bool {
        self.0.context == other.0.context
    }
}

impl Inner {
    /// Makes the context current, whatever was.
    pub(super) fn make_current(&self) -> Result<()> {
        // SAFETY: a context that we hold.
        let code = unsafe { (self.api.ctx_set_current)(self.context) };
        self.api.check(code, "choosing a GPU")?;
        CURRENT.set(self.id);
        Ok(())
    }

    /// Makes the context current unless we were the last to choose one and chose this: the check
    /// that a launch can afford.
    #[inline]
    pub(super) fn ensure_current(&self) -> Result<()> {
        if CURRENT.get() == self.id { Ok(()) } else { self.make_current() }
    }

    fn new_pool(&self, ordinal: u32) -> Result<sys::CUmemoryPool> {
        let properties = sys::CUmemPoolProps {
            allocType: sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED,
            handleTypes: sys::CUmemAllocationHandleType::CU_MEM_HANDLE_TYPE_NONE,
            location: sys::CUmemLocation {
                type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE,
                id: ordinal.cast_signed(),
            },
            win32SecurityAttributes: null_mut(),
            maxSize: 0,
            usage: 0,
            reserved: [0; 54],
        };
        let mut pool = null_mut();
        // SAFETY: a place for the pool, and properties that are filled in.
        let code = unsafe { (self.api.mem_pool_create)(&mut pool, &properties) };
        self.api.check(code, "making a pool of memory")?;
        // Freed memory stays in the pool, so that a repeated run allocates nothing.
        let mut keep = u64::MAX;
        let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: this attribute is a 64-bit number.
        let code =
            unsafe { (self.api.mem_pool_set_attribute)(pool, attribute, (&raw mut keep).cast()) };
        self.api.check(code, "making a pool of memory")?;
        Ok(pool)
    }

    fn pool_attribute(&self, attribute: sys::CUmemPool_attribute) -> Result<u64> {
        let mut value = 0u64;
        // SAFETY: the attributes that we ask for are 64-bit numbers.
        let code = unsafe {
            (self.api.mem_pool_get_attribute)(self.pool, attribute, (&raw mut value).cast())
        };
        self.api.check(code, "asking for the pool's memory")?;
        Ok(value)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nobody can be told of a failure here; at the end of a process the driver may be gone.
        let _ = self.make_current();
        // SAFETY: the pool and the context are ours, and everything made from them keeps `Inner`
        // alive, so this is their last use.
        unsafe {
            if !self.pool.is_null() {
                let _ = (self.api.mem_pool_destroy)(self.pool);
            }
            let _ = (self.api.primary_ctx_release)(self.device);
        }
        CURRENT.set(0);
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Properties { ordinal, name, .. } = self.properties();
        write!(f, "Gpu({ordinal}: {name}, {})", self.arch())
    }
}

fn properties(api: &Api, ordinal: u32, device: sys::CUdevice) -> Result<Properties> {
    const ASKING: &str = "asking for the GPU's properties";
    use sys::CUdevice_attribute as A;
    let get = |attribute: A| -> Result<u32> {
        let mut value: c_int = 0;
        // SAFETY: a place for an int, and a device.
        let code = unsafe { (api.device_get_attribute)(&mut value, attribute, device) };
        api.check(code, ASKING)?;
        Ok(value.unsigned_abs())
    };
    // Clocks are gone from some systems' answers (virtual machines); a device works without.
    let get_or_0 = |attribute: A| get(attribute).unwrap_or(0);
    let mut name = [0u8; 256];
    // SAFETY: room for as many bytes as said.
    let code = unsafe { (api.device_get_name)(name.as_mut_ptr().cast(), 256, device) };
    api.check(code, ASKING)?;
    let name = name.split(|b| *b == 0).next().unwrap_or_default();
    let mut memory_bytes = 0;
    // SAFETY: a place for a size.
    let code = unsafe { (api.device_total_mem)(&mut memory_bytes, device) };
    api.check(code, ASKING)?;
    Ok(Properties {
        ordinal,
        name: String::from_utf8_lossy(name).into_owned(),
        major: get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        minor: get(A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        memory_bytes: memory_bytes as u64,
        l2_bytes: get(A::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)?.into(),
        sm_count: get(A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        smem_per_sm_bytes: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)?,
        smem_per_block_optin_bytes: get(A::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
        smem_reserved_per_block_bytes: get(
            A::CU_DEVICE_ATTRIBUTE_RESERVED_SHARED_MEMORY_PER_BLOCK,
        )?,
        registers_per_sm: get(A::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR)?,
        registers_per_block: get(A::CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK)?,
        threads_per_sm: get(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR)?,
        threads_per_block: get(A::CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
        blocks_per_sm: get(A::CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR)?,
        clock_khz: get_or_0(A::CU_DEVICE_ATTRIBUTE_CLOCK_RATE),
        memory_clock_khz: get_or_0(A::CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE),
        memory_bus_bits: get_or_0(A::CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH),
        cluster_launch: get_or_0(A::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) != 0,
        cooperative_launch: get_or_0(A::CU_DEVICE_ATTRIBUTE_COOPERATIVE_LAUNCH) != 0,
        ecc: get_or_0(A::CU_DEVICE_ATTRIBUTE_ECC_ENABLED) != 0,
        pci: (
            get(A::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            get(A::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?,
            get(A::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
        ),
    })
}
