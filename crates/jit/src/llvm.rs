//! The calls into LLVM's C interface.
//!
//! Each function here is safe to call: handles never leave it, are released on every path, and text
//! goes in and out as Rust strings. LLVM contexts are made per compilation, so that several threads
//! can compile at once.

use crate::prototype::Prototype;
use llvm_sys::core::*;
use llvm_sys::error::{LLVMDisposeErrorMessage, LLVMErrorRef, LLVMGetErrorMessage};
use llvm_sys::ir_reader::LLVMParseIRInContext2;
use llvm_sys::orc2::lljit::*;
use llvm_sys::orc2::*;
use llvm_sys::prelude::*;
use llvm_sys::target_machine::*;
use llvm_sys::transforms::pass_builder::*;
use std::ffi::{CStr, CString, c_char};
use std::ptr;
use std::sync::Once;
use tilewright_base::{Error, Result};

/// The version of LLVM that is linked: `22`.
pub fn llvm_version() -> &'static str {
    "22"
}

/// This machine in LLVM's words.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) triple: String,
    pub(crate) cpu: String,
    pub(crate) features: String,
}

/// What a compilation gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Object,
    Assembly,
}

fn initialise() {
    static ONCE: Once = Once::new();
    // SAFETY: registers the native target; called once.
    ONCE.call_once(|| unsafe {
        llvm_sys::target::LLVM_InitializeNativeTarget();
        llvm_sys::target::LLVM_InitializeNativeAsmPrinter();
        llvm_sys::target::LLVM_InitializeNativeAsmParser();
    });
}

/// Takes over a string that LLVM allocated.
///
/// # Safety
/// `text` is null or a NUL-terminated string to be freed with `LLVMDisposeMessage`.
unsafe fn take(text: *mut c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: by this function's contract.
    unsafe {
        let owned = CStr::from_ptr(text).to_string_lossy().into_owned();
        LLVMDisposeMessage(text);
        owned
    }
}

/// Turns LLVM's error handle into ours; null is success.
///
/// # Safety
/// `error` is null or an error handle that nobody else consumes.
unsafe fn check(error: LLVMErrorRef, what: &str) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: by this function's contract; getting the message consumes the error.
    unsafe {
        let message = LLVMGetErrorMessage(error);
        let text = CStr::from_ptr(message).to_string_lossy().into_owned();
        LLVMDisposeErrorMessage(message);
        Err(Error::bug(format!("LLVM, {what}: {text}")))
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| Error::bug("a zero byte in text for LLVM"))
}

impl Host {
    pub(crate) fn detect() -> Result<Host> {
        initialise();
        // SAFETY: these calls give owned strings.
        let host = unsafe {
            Host {
                triple: take(LLVMGetDefaultTargetTriple()),
                cpu: take(LLVMGetHostCPUName()),
                features: take(LLVMGetHostCPUFeatures()),
            }
        };
        Machine::new(&host)?;
        Ok(host)
    }
}

/// A target machine, released on drop.
struct Machine(LLVMTargetMachineRef);

impl Machine {
    fn new(host: &Host) -> Result<Machine> {
        let (triple, cpu, features) =
            (c_string(&host.triple)?, c_string(&host.cpu)?, c_string(&host.features)?);
        // SAFETY: the strings outlive the calls; `target` is set when the lookup succeeds.
        unsafe {
            let mut target = ptr::null_mut();
            let mut message = ptr::null_mut();
            if LLVMGetTargetFromTriple(triple.as_ptr(), &mut target, &mut message) != 0 {
                let text = take(message);
                return Err(Error::unsupported(format!(
                    "LLVM has no target {}: {text}",
                    host.triple
                )));
            }
            let machine = LLVMCreateTargetMachine(
                target,
                triple.as_ptr(),
                cpu.as_ptr(),
                features.as_ptr(),
                LLVMCodeGenOptLevel::LLVMCodeGenLevelDefault,
                LLVMRelocMode::LLVMRelocPIC,
                LLVMCodeModel::LLVMCodeModelSmall,
            );
            if machine.is_null() {
                return Err(Error::unsupported(format!("LLVM cannot compile for {}", host.cpu)));
            }
            Ok(Machine(machine))
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: made in `new`, released once.
        unsafe { LLVMDisposeTargetMachine(self.0) }
    }
}

/// A context with at most one module in it, released on drop in the right order.
struct Context {
    context: LLVMContextRef,
    module: LLVMModuleRef,
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: both were made for this struct and are released once, the module first.
        unsafe {
            if !self.module.is_null() {
                LLVMDisposeModule(self.module);
            }
            LLVMContextDispose(self.context);
        }
    }
}

/// Parses, optimises and compiles one module.
pub(crate) fn compile(host: &Host, text: &str, passes: &str, output: Output) -> Result<Vec<u8>> {
    let machine = Machine::new(host)?;
    let text_c = c_string(text)?;
    let passes_c = c_string(passes)?;
    // SAFETY: the context is owned by `holder` from its creation on; the memory buffer copies the
    // text and is released after parsing; the options and the result buffer are released here.
    unsafe {
        let mut holder = Context { context: LLVMContextCreate(), module: ptr::null_mut() };
        let buffer = LLVMCreateMemoryBufferWithMemoryRangeCopy(
            text_c.as_ptr(),
            text_c.as_bytes().len(),
            c"kernel.ll".as_ptr(),
        );
        let mut message = ptr::null_mut();
        let mut module = ptr::null_mut();
        let refused = LLVMParseIRInContext2(holder.context, buffer, &mut module, &mut message) != 0;
        LLVMDisposeMemoryBuffer(buffer);
        if refused {
            let message = take(message);
            return Err(Error::bug(format!("LLVM does not accept the generated text: {message}")));
        }
        holder.module = module;
        let layout = LLVMCreateTargetDataLayout(machine.0);
        llvm_sys::target::LLVMSetModuleDataLayout(module, layout);
        llvm_sys::target::LLVMDisposeTargetData(layout);
        let triple = c_string(&host.triple)?;
        LLVMSetTarget(module, triple.as_ptr());

        let options = LLVMCreatePassBuilderOptions();
        // The text is vectorised and unrolled already; LLVM's own attempts only cost time.
        LLVMPassBuilderOptionsSetLoopVectorization(options, 0);
        LLVMPassBuilderOptionsSetSLPVectorization(options, 0);
        LLVMPassBuilderOptionsSetLoopInterleaving(options, 0);
        let failed = LLVMRunPasses(module, passes_c.as_ptr(), machine.0, options);
        LLVMDisposePassBuilderOptions(options);
        check(failed, "running passes")?;

        let kind = match output {
            Output::Object => LLVMCodeGenFileType::LLVMObjectFile,
            Output::Assembly => LLVMCodeGenFileType::LLVMAssemblyFile,
        };
        let mut result = ptr::null_mut();
        let mut message = ptr::null_mut();
        if LLVMTargetMachineEmitToMemoryBuffer(machine.0, module, kind, &mut message, &mut result)
            != 0
        {
            return Err(Error::bug(format!("LLVM cannot emit code: {}", take(message))));
        }
        let (start, size) = (LLVMGetBufferStart(result).cast::<u8>(), LLVMGetBufferSize(result));
        let bytes = std::slice::from_raw_parts(start, size).to_vec();
        LLVMDisposeMemoryBuffer(result);
        Ok(bytes)
    }
}

/// Machine code in memory; unmapped on drop.
pub struct Library {
    jit: LLVMOrcLLJITRef,
    functions: Vec<Function>,
}

/// One loaded function.
struct Function {
    address: usize,
    prototype: Prototype,
}

// SAFETY: after loading, the handle is only used to release the library; addresses are numbers.
unsafe impl Send for Library {}
// SAFETY: as above.
unsafe impl Sync for Library {}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Library({} functions)", self.functions.len())
    }
}

impl Library {
    /// Address of function `i`; valid while the library lives.
    pub fn address(&self, i: usize) -> *const () {
        self.functions[i].address as *const ()
    }

    /// Name and type of function `i`, as its source defines it.
    pub fn prototype(&self, i: usize) -> Option<&Prototype> {
        self.functions.get(i).map(|f| &f.prototype)
    }

    /// Number of functions.
    pub fn len(&self) -> usize {
        self.functions.len()
    }

    /// True when there are none.
    pub fn is_empty(&self) -> bool {
        self.functions.is_empty()
    }

    /// Loads object files, each with the symbol that is looked up in it and that symbol's prototype.
    /// Equal symbols mean equal objects and are loaded once.
    pub(crate) fn load(objects: Vec<(String, Vec<u8>, Prototype)>) -> Result<Library> {
        initialise();
        // SAFETY: the LLJIT is owned by `library` from its creation on. Object buffers copy their
        // bytes and are consumed. The generator, once added, belongs to the library.
        unsafe {
            let mut jit = ptr::null_mut();
            check(LLVMOrcCreateLLJIT(&mut jit, ptr::null_mut()), "starting the JIT")?;
            let mut library = Library { jit, functions: Vec::with_capacity(objects.len()) };
            let dylib = LLVMOrcLLJITGetMainJITDylib(jit);
            // Kernels call nothing, but LLVM may turn a loop into a call of memcpy or memset.
            let mut generator = ptr::null_mut();
            let prefix = LLVMOrcLLJITGetGlobalPrefix(jit);
            let made = LLVMOrcCreateDynamicLibrarySearchGeneratorForProcess(
                &mut generator,
                prefix,
                None,
                ptr::null_mut(),
            );
            check(made, "looking up the process's symbols")?;
            LLVMOrcJITDylibAddGenerator(dylib, generator);
            let mut seen = std::collections::BTreeSet::new();
            for (symbol, object, _) in &objects {
                if !seen.insert(symbol.as_str()) {
                    continue;
                }
                let name = c_string(symbol)?;
                let buffer = LLVMCreateMemoryBufferWithMemoryRangeCopy(
                    object.as_ptr().cast(),
                    object.len(),
                    name.as_ptr(),
                );
                check(LLVMOrcLLJITAddObjectFile(jit, dylib, buffer), "loading machine code")?;
            }
            for (symbol, _, prototype) in objects {
                let name = c_string(&symbol)?;
                let mut address: LLVMOrcExecutorAddress = 0;
                check(LLVMOrcLLJITLookup(jit, &mut address, name.as_ptr()), "finding a kernel")?;
                library.functions.push(Function { address: address as usize, prototype });
            }
            Ok(library)
        }
    }
}

impl Drop for Library {
    fn drop(&mut self) {
        // SAFETY: made in `load`, released once. An error while unloading has no remedy.
        unsafe {
            let _ = check(LLVMOrcDisposeLLJIT(self.jit), "unloading machine code");
        }
    }
}
