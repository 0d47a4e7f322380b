//! [`Module`]: loaded machine code, and [`Function`]: a kernel in it.

use super::api::{code, driver_version};
use super::device::Gpu;
use crate::{Arch, Compiled};
use cudarc::driver::sys;
use std::ffi::{CString, c_int};
use std::fmt;
use std::ptr::null_mut;
use std::sync::Arc;
use tilewright_base::{Error, Result};

/// Machine code on a device. Cheap to clone; unloaded with its last clone and last [`Function`].
#[derive(Clone)]
pub struct Module(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    raw: sys::CUmodule,
    name: String,
    /// Where it came from, for messages; none for bytes of unknown origin.
    compiled: Option<Compiled>,
}

// SAFETY: a handle, which the driver takes on any thread; see `device::Inner`.
unsafe impl Send for Inner {}
// SAFETY: as above; nothing changes after the construction.
unsafe impl Sync for Inner {}

impl Gpu {
    /// Loads a compiled module: its machine code where the device runs it; what was built for an earlier architecture as
    /// assembly text, which the driver translates.
    pub fn load(&self, compiled: &Compiled) -> Result<Module> {
        let (name, cubin) = (compiled.name(), compiled.cubin());
        let (device, arch) = (self.properties(), compiled.arch());
        let runs = arch.runs_on(device.major, device.minor);
        if !runs && arch.translates_to(device.major, device.minor) {
            return self.load_text(compiled).map_err(|e| {
                let context = format!("translating module {name}, built for {arch}");
                with_origin(e, Some(compiled)).with_context(context)
            });
        }
        self.load_as(name, cubin, compiled.arch(), Some(compiled)).map_err(|e| {
            with_origin(e, Some(compiled)).with_context(format!("loading module {name}"))
        })
    }

    /// Loads machine code (a cubin) of any origin. `name` is for messages.
    pub fn load_cubin(&self, name: &str, cubin: &[u8]) -> Result<Module> {
        let arch = Arch::of_cubin(cubin)
            .ok_or_else(|| Error::user(format!("{name} is not machine code for a GPU (a cubin)")));
        arch.and_then(|arch| self.load_as(name, cubin, arch, None))
            .map_err(|e| e.with_context(format!("loading module {name}")))
    }

    /// Loads assembly text.
    fn load_text(&self, compiled: &Compiled) -> Result<Module> {
        let text = CString::new(compiled.ptx())
            .map_err(|_| Error::bug("the assembly text has a zero byte"))?;
        self.make_current()?;
        let mut raw = null_mut();
        // SAFETY: a place for the module, and a text that ends with a zero byte, which the driver does not keep.
        let result = unsafe { (self.0.api.module_load_data)(&mut raw, text.as_ptr().cast()) };
        self.loaded(result, raw, compiled.name(), compiled.arch(), Some(compiled))
    }

    fn load_as(
        &self,
        name: &str,
        cubin: &[u8],
        arch: Arch,
        compiled: Option<&Compiled>,
    ) -> Result<Module> {
        let device = self.properties();
        if !arch.runs_on(device.major, device.minor) {
            return Err(wrong_arch(arch, self));
        }
        self.make_current()?;
        let mut raw = null_mut();
        // SAFETY: a place for the module, and the bytes of a cubin. The driver is not told their
        // length but finds it in them; they are whole, because a compilation gave them, or because
        // `load_cubin` checked that every section lies inside (`Arch::of_cubin`).
        let result = unsafe { (self.0.api.module_load_data)(&mut raw, cubin.as_ptr().cast()) };
        self.loaded(result, raw, name, arch, compiled)
    }

    /// What came of loading a module.
    fn loaded(
        &self,
        result: c_int,
        raw: sys::CUmodule,
        name: &str,
        arch: Arch,
        compiled: Option<&Compiled>,
    ) -> Result<Module> {
        match result {
            0 => Ok(Module(Arc::new(Inner {
                gpu: self.clone(),
                raw,
                name: name.to_owned(),
                compiled: compiled.cloned(),
            }))),
            code::NO_BINARY_FOR_GPU => Err(wrong_arch(arch, self)),
            code::UNSUPPORTED_PTX | code::INVALID_IMAGE => {
                let error = self.0.api.error(result, "loading machine code");
                Err(too_new(error, compiled.map(|c| c.nvrtc_version), driver_version()?))
            }
            other => Err(self.0.api.error(other, "loading machine code")),
        }
    }
}

fn wrong_arch(arch: Arch, gpu: &Gpu) -> Error {
    let device = gpu.properties();
    Error::unsupported(format!(
        "built for {arch}, and {} is of compute capability {}.{}",
        device.name, device.major, device.minor
    ))
    .with_hint(format!("compile for {}", device.arch()))
}

/// A compiler newer than the driver is the usual reason for code that the driver does not take.
fn too_new(error: Error, compiler: Option<(u32, u32)>, driver: (u32, u32)) -> Error {
    match compiler {
        Some(compiler) if compiler > driver => Error::unsupported(format!(
            "the NVIDIA driver supports CUDA {}.{}, and the module was compiled by NVRTC {}.{}",
            driver.0, driver.1, compiler.0, compiler.1
        ))
        .with_note(error.message().to_owned())
        .with_hint(format!(
            "install a newer driver, or name an NVRTC of CUDA {}.{} or earlier in {}",
            driver.0,
            driver.1,
            crate::find::NVRTC_VARIABLE
        )),
        _ => error,
    }
}

/// Adds where source, log and machine code are.
fn with_origin(error: Error, compiled: Option<&Compiled>) -> Error {
    let Some(compiled) = compiled else { return error };
    let error = match compiled.keep() {
        Ok(folder) => error.with_note(format!(
            "source, log and machine code are in {} (kernel.cu, log.txt, kernel.cubin)",
            folder.display()
        )),
        Err(e) => error.with_note(format!("source and machine code could not be kept: {e}")),
    };
    error.with_note(format!("the compiler's log:\n{}", compiled.log()))
}

impl Module {
    /// A kernel by its name.
    pub fn function(&self, name: &str) -> Result<Function> {
        let Inner { gpu, raw: module, .. } = &*self.0;
        let missing = || {
            let error = Error::bug(format!("module {} has no kernel `{name}`", self.0.name));
            let names = self.0.compiled.iter().flat_map(|c| &c.functions).filter(|f| f.is_kernel);
            let names = names.map(|f| f.name.as_str()).collect::<Vec<_>>();
            if names.is_empty() {
                error
            } else {
                error.with_note(format!("it has {}", names.join(", ")))
            }
        };
        let symbol = CString::new(name).map_err(|_| missing())?;
        gpu.make_current()?;
        let mut raw = null_mut();
        // SAFETY: a place for the function, a module and a zero-terminated name.
        let result = unsafe { (gpu.0.api.module_get_function)(&mut raw, *module, symbol.as_ptr()) };
        if result == code::NOT_FOUND {
            return Err(missing());
        }
        gpu.0.api.check(result, &format!("finding kernel {name}"))?;
        Ok(Function { module: self.clone(), raw, name: name.into() })
    }

    /// The device it is on.
    pub fn gpu(&self) -> &Gpu {
        &self.0.gpu
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = self.gpu.make_current();
        // SAFETY: our module; its functions keep it alive, so none is left.
        let _ = unsafe { (self.gpu.0.api.module_unload)(self.raw) };
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Module({} on {:?})", self.0.name, self.0.gpu)
    }
}

/// A kernel.
#[derive(Clone)]
pub struct Function {
    module: Module,
    pub(super) raw: sys::CUfunction,
    name: Arc<str>,
}

// SAFETY: a handle that the module keeps alive; see `device::Inner`.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// What a kernel takes, as the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub struct FunctionAttributes {
    pub registers: u32,
    /// Memory per thread for spilled registers, local arrays and calls.
    pub local_bytes: u32,
    pub static_smem_bytes: u32,
    /// The most that a launch may ask for at present; `prepare` raises it.
    pub max_dynamic_smem_bytes: u32,
    pub max_threads_per_block: u32,
    /// Compute capability of the code: 90 of `sm_90a`.
    pub binary_version: u32,
}

impl Function {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The device it is on.
    pub fn gpu(&self) -> &Gpu {
        self.module.gpu()
    }

    /// The compilation that it comes from; none for machine code of another origin.
    pub fn compiled(&self) -> Option<&Compiled> {
        self.module.0.compiled.as_ref()
    }

    /// What it takes.
    pub fn attributes(&self) -> Result<FunctionAttributes> {
        use sys::CUfunction_attribute as A;
        Ok(FunctionAttributes {
            registers: self.attribute(A::CU_FUNC_ATTRIBUTE_NUM_REGS)?,
            local_bytes: self.attribute(A::CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES)?,
            static_smem_bytes: self.attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?,
            max_dynamic_smem_bytes: self
                .attribute(A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)?,
            max_threads_per_block: self.attribute(A::CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK)?,
            binary_version: self.attribute(A::CU_FUNC_ATTRIBUTE_BINARY_VERSION)?,
        })
    }

    fn attribute(&self, attribute: sys::CUfunction_attribute) -> Result<u32> {
        self.gpu().make_current()?;
        let mut value: c_int = 0;
        // SAFETY: a place for an int, and a function.
        let code =
            unsafe { (self.gpu().0.api.func_get_attribute)(&mut value, attribute, self.raw) };
        self.gpu().0.api.check(code, &format!("asking what kernel {} takes", self.name))?;
        Ok(value.unsigned_abs())
    }

    pub(super) fn set_attribute(
        &self,
        attribute: sys::CUfunction_attribute,
        value: u32,
    ) -> Result<()> {
        self.gpu().make_current()?;
        // SAFETY: a function; the driver checks the value.
        let code = unsafe {
            (self.gpu().0.api.func_set_attribute)(self.raw, attribute, value.cast_signed())
        };
        if code == 0 { Ok(()) } else { Err(self.error(code, "setting an attribute of")) }
    }

    /// Blocks that fit one multiprocessor at once.
    pub fn max_blocks_per_sm(&self, block_threads: u32, dynamic_smem_bytes: u32) -> Result<u32> {
        self.allow_smem(dynamic_smem_bytes)?;
        self.gpu().make_current()?;
        let mut blocks: c_int = 0;
        // SAFETY: a place for an int, and a function.
        let code = unsafe {
            (self.gpu().0.api.occupancy_max_active_blocks)(
                &mut blocks,
                self.raw,
                block_threads.cast_signed(),
                dynamic_smem_bytes as usize,
            )
        };
        if code == 0 { Ok(blocks.unsigned_abs()) } else { Err(self.error(code, "fitting")) }
    }

    /// Allows launches with that much dynamic shared memory. It only ever raises what is allowed,
    /// because prepared launches of one function share it.
    pub(super) fn allow_smem(&self, dynamic_smem_bytes: u32) -> Result<()> {
        use sys::CUfunction_attribute as A;
        let at_most = self.gpu().properties().smem_per_block_optin_bytes;
        let fixed = self.attribute(A::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES)?;
        if dynamic_smem_bytes.saturating_add(fixed) > at_most {
            return Err(Error::unsupported(format!(
                "kernel {} needs {dynamic_smem_bytes} + {fixed} bytes of shared memory per block, and {} has {at_most}",
                self.name,
                self.gpu().properties().name
            )));
        }
        let allowed = A::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if dynamic_smem_bytes > self.attribute(allowed)? {
            self.set_attribute(allowed, dynamic_smem_bytes)?;
        }
        Ok(())
    }

    /// Sizes and places of the parameters, in the order of the declaration: offset and length.
    pub(super) fn parameters(&self) -> Result<Vec<(usize, usize)>> {
        self.gpu().make_current()?;
        let mut found = Vec::new();
        loop {
            let (mut offset, mut size) = (0, 0);
            // SAFETY: two places for sizes, and a function; an index past the end is refused.
            let result = unsafe {
                (self.gpu().0.api.func_get_param_info)(
                    self.raw,
                    found.len(),
                    &mut offset,
                    &mut size,
                )
            };
            match result {
                0 => found.push((offset, size)),
                code::INVALID_VALUE => return Ok(found),
                other => return Err(self.error(other, "asking for the parameters of")),
            }
        }
    }

    /// The error of a driver call about this kernel, with where its source is.
    #[cold]
    pub(super) fn error(&self, code: c_int, doing: &str) -> Error {
        let error = self.gpu().0.api.error(code, &format!("{doing} kernel {}", self.name));
        with_origin(error, self.module.0.compiled.as_ref())
    }
}

impl fmt::Debug for Function {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Function({} of {:?})", self.name, self.module)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_base::Kind;

    #[test]
    fn a_compiler_newer_than_the_driver_is_named() {
        let error = too_new(Error::bug("no"), Some((13, 0)), (12, 8));
        assert_eq!(error.kind(), Kind::Unsupported);
        assert!(error.message().contains("12.8") && error.message().contains("13.0"));
        assert_eq!(too_new(Error::bug("no"), Some((12, 8)), (13, 0)).message(), "no");
        assert_eq!(too_new(Error::bug("no"), None, (13, 0)).message(), "no");
    }
}
