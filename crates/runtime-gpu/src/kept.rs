//! A plan with sizes as bytes, for another process: [`Direct::keep`], [`Kept`] and [`KeptFolder`].
//!
//! A second process neither plans nor lowers nor looks for kernels one by one: it loads machine code, copies the constants
//! and puts arguments in their places.
//!
//! ```text
//! "tilewright run 1\n"
//! 8 bytes    length of the head, little endian
//! the head   JSON: kernels with arguments and places, sizes, names and lengths of what follows
//! the rest   machine code of each module, then the constants
//! 32 bytes   SHA-256 of all before
//! ```

use crate::direct::{Direct, Fitted, Place, Ready};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use tilewright_base::{Error, Result};
use tilewright_cuda::Buffer;
use tilewright_launch::{BoundKernel, KeptKernel, KeptModules, Loader};

const MAGIC: &[u8] = b"tilewright run 1\n";

/// Plans with more bytes of constants are not kept: copying them twice costs more than planning.
const MOST_CONSTANTS: usize = 64 << 20;

/// All but machine code and constants.
#[derive(Serialize, Deserialize)]
struct Head {
    steps: Vec<Step>,
    scratch_bytes: usize,
    input_bytes: Vec<usize>,
    output_bytes: Vec<usize>,
    output_shapes: Vec<Vec<usize>>,
    schedules: Vec<String>,
    /// Names and lengths.
    modules: Vec<(String, usize)>,
    constant_bytes: usize,
}

/// A launch of a step.
#[derive(Serialize, Deserialize)]
struct Step {
    step: usize,
    kernel: KeptKernel,
    places: Vec<Place>,
}

/// A plan with sizes that another process worked out, on this device.
pub struct Kept {
    fitted: Fitted,
    output_shapes: Vec<Vec<usize>>,
    /// Kernels read it.
    _constants: Buffer,
}

impl Direct {
    /// The plan for these values of its symbols as bytes, if it is one that can be kept.
    ///
    /// # Errors
    /// As [`Direct::fit`].
    pub fn keep(&self, sizes: &[i64]) -> Result<Option<Vec<u8>>> {
        let fitted = self.fit(sizes)?;
        let constants = self.constants().memory();
        let (from, constant_bytes) = (constants.address(), constants.len());
        if constant_bytes > MOST_CONSTANTS {
            return Ok(None);
        }
        let (mut steps, mut modules) = (Vec::new(), KeptModules::default());
        let all = fitted.with_steps(|ready| {
            for Ready { step, kernel, places } in ready {
                if kernel.is_empty() {
                    continue;
                }
                let Some(kernel) = kernel.keep(&mut modules) else { return false };
                let relative = |place: &Place| match *place {
                    Place::Fixed(address) => Place::Fixed(address.wrapping_sub(from)),
                    other => other,
                };
                let places: Vec<Place> = places.iter().map(relative).collect();
                // Constants that others hold may lie right behind.
                let inside =
                    |p: &Place| !matches!(p, Place::Fixed(at) if *at >= constant_bytes as u64);
                if !places.iter().all(inside) {
                    return false;
                }
                steps.push(Step { step: *step, kernel, places });
            }
            true
        });
        if !all {
            return Ok(None);
        }
        let head = Head {
            steps,
            scratch_bytes: fitted.scratch_bytes(),
            input_bytes: fitted.input_bytes().to_vec(),
            output_bytes: fitted.output_bytes().to_vec(),
            output_shapes: self.output_shapes(sizes)?,
            schedules: fitted.schedules().to_vec(),
            modules: modules.code.iter().map(|(name, code)| (name.clone(), code.len())).collect(),
            constant_bytes,
        };
        let mut values = vec![0; constant_bytes];
        if constant_bytes > 0 {
            constants.read_at(&self.loader().gpu().stream()?, 0, &mut values)?;
        }
        whole(&head, &modules, &values).map(Some)
    }
}

/// All parts as bytes.
fn whole(head: &Head, modules: &KeptModules, constants: &[u8]) -> Result<Vec<u8>> {
    let head = serde_json::to_vec(head).map_err(|e| Error::bug(format!("a plan as text: {e}")))?;
    let mut bytes = MAGIC.to_vec();
    bytes.extend((head.len() as u64).to_le_bytes());
    bytes.extend(head);
    for (_, code) in &modules.code {
        bytes.extend(code);
    }
    bytes.extend(constants);
    let sum = Sha256::digest(&bytes);
    bytes.extend(sum);
    Ok(bytes)
}

/// The parts of a plan's bytes; none when they are not whole.
fn parts(bytes: &[u8]) -> Option<(Head, KeptModules, &[u8])> {
    let (bytes, sum) = bytes.split_last_chunk::<32>()?;
    if Sha256::digest(bytes)[..] != sum[..] {
        return None;
    }
    let rest = bytes.strip_prefix(MAGIC)?;
    let (length, rest) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (head, mut rest) = rest.split_at_checked(length)?;
    let head: Head = serde_json::from_slice(head).ok()?;
    let mut modules = KeptModules::default();
    for (name, length) in &head.modules {
        let (code, behind) = rest.split_at_checked(*length)?;
        modules.code.push((name.clone(), code.to_vec()));
        rest = behind;
    }
    (rest.len() == head.constant_bytes).then_some((head, modules, rest))
}

impl Kept {
    /// What [`Direct::keep`] wrote, on this loader's device. None where the bytes are not whole.
    ///
    /// # Errors
    /// When memory does not suffice; the driver's.
    pub fn restore(bytes: &[u8], loader: &Loader) -> Result<Option<Kept>> {
        let Some((head, modules, constants)) = parts(bytes) else { return Ok(None) };
        let gpu = loader.gpu();
        let stream = gpu.stream()?;
        let memory = stream.alloc(constants.len().max(1))?;
        memory.write_at(&stream, 0, constants)?;
        let modules = modules.load(gpu)?;
        let mut steps = Vec::new();
        for Step { step, kernel, places } in &head.steps {
            let kernel = BoundKernel::restore(kernel, &modules)?;
            let absolute = |place: &Place| match *place {
                Place::Fixed(offset) => Place::Fixed(memory.address().wrapping_add(offset)),
                other => other,
            };
            let places: Vec<Place> = places.iter().map(absolute).collect();
            let known = |place: &Place| match *place {
                Place::Input(i, _) => i < head.input_bytes.len(),
                Place::Output(i, _) => i < head.output_bytes.len(),
                Place::Scratch(_) | Place::Fixed(_) => true,
            };
            if !places.iter().all(known) {
                return Ok(None);
            }
            steps.push(Ready { step: *step, kernel, places });
        }
        stream.synchronize()?;
        let Head { scratch_bytes, input_bytes, output_bytes, output_shapes, schedules, .. } = head;
        let fitted =
            Fitted::of(steps, &stream, scratch_bytes, [input_bytes, output_bytes], schedules);
        Ok(Some(Kept { fitted, output_shapes, _constants: memory }))
    }

    /// The plan with sizes.
    pub fn fitted(&self) -> &Fitted {
        &self.fitted
    }

    /// Shapes of its outputs.
    pub fn output_shapes(&self) -> &[Vec<usize>] {
        &self.output_shapes
    }
}

/// Where plans are kept: `<cache>/cuda/runs/<2 digits>/<name>`.
#[derive(Clone, Debug)]
pub struct KeptFolder(PathBuf);

impl KeptFolder {
    /// Below the folder of everything cached.
    pub fn new(cache: &Path) -> KeptFolder {
        KeptFolder(cache.join("cuda").join("runs"))
    }

    /// The name of what depends on these texts.
    pub fn name(texts: &[&str]) -> String {
        let mut sum = Sha256::new();
        for text in texts {
            sum.update((text.len() as u64).to_le_bytes());
            sum.update(text);
        }
        sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name.get(..2).unwrap_or("")).join(name)
    }

    /// What was stored under a name.
    pub fn load(&self, name: &str) -> Option<Vec<u8>> {
        fs::read(self.path(name)).ok()
    }

    /// Stores bytes under a name, whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub fn store(&self, name: &str, bytes: &[u8]) -> std::io::Result<()> {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let path = self.path(name);
        let folder = path.parent().unwrap_or(&self.0);
        fs::create_dir_all(folder)?;
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let draft = folder.join(format!(".{name}.{}.{number}", std::process::id()));
        let written = fs::write(&draft, bytes).and_then(|()| fs::rename(&draft, &path));
        if written.is_err() {
            let _ = fs::remove_file(&draft);
        }
        written
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Vec<u8> {
        let code = vec![("first".to_string(), vec![1, 2, 3]), ("second".to_string(), vec![4])];
        let head = Head {
            steps: Vec::new(),
            scratch_bytes: 256,
            input_bytes: vec![16],
            output_bytes: vec![32, 0],
            output_shapes: vec![vec![4, 2], vec![0]],
            schedules: vec!["a schedule".into()],
            modules: code.iter().map(|(name, code)| (name.clone(), code.len())).collect(),
            constant_bytes: 5,
        };
        whole(&head, &KeptModules { code }, &[5, 6, 7, 8, 9]).unwrap()
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = sample();
        let (head, modules, constants) = parts(&bytes).unwrap();
        assert_eq!((head.scratch_bytes, head.output_shapes), (256, vec![vec![4, 2], vec![0]]));
        assert_eq!(modules.code[1], ("second".to_string(), vec![4]));
        assert_eq!(constants, [5, 6, 7, 8, 9]);
    }

    #[test]
    fn what_is_not_whole_is_not_read() {
        let bytes = sample();
        for length in 0..bytes.len() {
            assert!(parts(&bytes[..length]).is_none(), "{length} bytes of {}", bytes.len());
        }
        for at in 0..bytes.len() {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert!(parts(&other).is_none(), "byte {at} changed");
        }
        // A sum that fits does not help a head that does not.
        let (body, _) = bytes.split_last_chunk::<32>().unwrap();
        let mut longer = [body, &[0]].concat();
        let sum = Sha256::digest(&longer);
        longer.extend(sum);
        assert!(parts(&longer).is_none());
    }

    #[test]
    fn a_folder_gives_back_what_was_stored() {
        let root = std::env::temp_dir().join(format!("tilewright-kept-{}", std::process::id()));
        let folder = KeptFolder::new(&root);
        let name = KeptFolder::name(&["a device", "a graph"]);
        assert_ne!(name, KeptFolder::name(&["a devicea", " graph"]));
        assert_eq!(folder.load(&name), None);
        folder.store(&name, b"first").unwrap();
        folder.store(&name, b"second").unwrap();
        assert_eq!(folder.load(&name).as_deref(), Some(&b"second"[..]));
        std::fs::remove_dir_all(root).unwrap();
    }
}
