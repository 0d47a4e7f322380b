//! [`TensorMap`]: how the tensor memory accelerator (TMA) sees an array in device memory.
//!
//! Sizes, strides and boxes are listed from the innermost dimension (whose elements lie side by side)
//! outwards, as in the driver. One filled in by hand: a row-major `f16` matrix of 1000 × 640, read in
//! boxes of 128 rows × 64 columns, is
//!
//! ```
//! # use tilewright_cuda::{L2Promotion, MapElement, OobFill, Swizzle, TensorMapSpec};
//! let spec = TensorMapSpec {
//!     element: MapElement::F16,
//!     address: 0x7f00_0000_0000,
//!     sizes: vec![640, 1000],
//!     strides_bytes: vec![640 * 2],
//!     box_sizes: vec![64, 128],
//!     element_strides: vec![1, 1],
//!     swizzle: Swizzle::B128,
//!     l2_promotion: L2Promotion::B128,
//!     oob_fill: OobFill::Zero,
//!     windows: None,
//! };
//! assert_eq!((spec.problem(), spec.box_bytes()), (None, 128 * 64 * 2));
//! ```

use super::device::Gpu;
use cudarc::driver::sys;
use serde::{Deserialize, Serialize};
use std::fmt;
use tilewright_base::{DType, Error, Result};

/// An element as the accelerator knows it. Types of 8 bits are bytes to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum MapElement {
    U8,
    U16,
    U32,
    I32,
    U64,
    I64,
    F16,
    BF16,
    F32,
    F64,
    /// `f32` in memory, rounded to `tf32` on the way to shared memory.
    TF32,
}

impl MapElement {
    /// The element for a data type; none for types of 4 bits.
    pub fn of(dtype: DType) -> Option<MapElement> {
        Some(match dtype {
            DType::F64 => MapElement::F64,
            DType::F32 => MapElement::F32,
            DType::F16 => MapElement::F16,
            DType::BF16 => MapElement::BF16,
            DType::I64 => MapElement::I64,
            DType::U64 => MapElement::U64,
            DType::I32 => MapElement::I32,
            DType::U32 => MapElement::U32,
            DType::I16 | DType::U16 => MapElement::U16,
            DType::F8E4M3 | DType::F8E5M2 | DType::I8 | DType::U8 | DType::Bool => MapElement::U8,
            DType::I4 | DType::U4 => return None,
        })
    }

    /// Bytes of one element.
    pub fn bytes(self) -> u32 {
        self.row().0
    }

    fn is_float(self) -> bool {
        use MapElement as E;
        matches!(self, E::F16 | E::BF16 | E::F32 | E::F64 | E::TF32)
    }

    #[rustfmt::skip]
    fn row(self) -> (u32, sys::CUtensorMapDataType) {
        use sys::CUtensorMapDataType as T;
        match self {
            MapElement::U8   => (1, T::CU_TENSOR_MAP_DATA_TYPE_UINT8),
            MapElement::U16  => (2, T::CU_TENSOR_MAP_DATA_TYPE_UINT16),
            MapElement::U32  => (4, T::CU_TENSOR_MAP_DATA_TYPE_UINT32),
            MapElement::I32  => (4, T::CU_TENSOR_MAP_DATA_TYPE_INT32),
            MapElement::U64  => (8, T::CU_TENSOR_MAP_DATA_TYPE_UINT64),
            MapElement::I64  => (8, T::CU_TENSOR_MAP_DATA_TYPE_INT64),
            MapElement::F16  => (2, T::CU_TENSOR_MAP_DATA_TYPE_FLOAT16),
            MapElement::BF16 => (2, T::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16),
            MapElement::F32  => (4, T::CU_TENSOR_MAP_DATA_TYPE_FLOAT32),
            MapElement::F64  => (8, T::CU_TENSOR_MAP_DATA_TYPE_FLOAT64),
            MapElement::TF32 => (4, T::CU_TENSOR_MAP_DATA_TYPE_TFLOAT32),
        }
    }
}

/// How 16-byte pieces are permuted in shared memory, so that columns meet no bank conflicts. The
/// number is the span, in bytes, that is permuted: the inner side of a box is no longer than it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Swizzle {
    #[default]
    None,
    B32,
    B64,
    B128,
}

impl Swizzle {
    /// The span in bytes; none without swizzling.
    pub fn span_bytes(self) -> Option<u32> {
        match self {
            Swizzle::None => None,
            Swizzle::B32 => Some(32),
            Swizzle::B64 => Some(64),
            Swizzle::B128 => Some(128),
        }
    }
}

/// How much of the second-level cache's line is fetched at least.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum L2Promotion {
    #[default]
    None,
    B64,
    B128,
    B256,
}

/// What a box has where it reaches over the array's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum OobFill {
    /// Zero.
    #[default]
    Zero,
    /// A NaN that products treat as zero; for floating-point elements.
    Nan,
}

/// What a [`TensorMap`] says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TensorMapSpec {
    /// The elements.
    pub element: MapElement,
    /// Where the array starts. A multiple of 16.
    pub address: u64,
    /// Elements per dimension, innermost first; 1 to 5 dimensions.
    pub sizes: Vec<u64>,
    /// Bytes from one element to the next, for each dimension but the innermost. Multiples of 16.
    pub strides_bytes: Vec<u64>,
    /// Elements per dimension that one copy brings; at most 256 each.
    pub box_sizes: Vec<u32>,
    /// Every how many elements one is taken: 1, usually.
    pub element_strides: Vec<u32>,
    /// How a box lies in shared memory.
    pub swizzle: Swizzle,
    /// How much is fetched into the cache.
    pub l2_promotion: L2Promotion,
    /// What lies beyond the array.
    pub oob_fill: OobFill,
    /// Boxes are positions of a window over images instead.
    pub windows: Option<WindowBox>,
}

/// Where a window may stand (the accelerator's im2col mode). The array has four dimensions: channels, columns, rows,
/// images. A box is `box_sizes[0]` channels of `box_sizes[1]` windows (the other box sizes are 1), one after another along
/// columns, rows and images; `element_strides` are the steps of windows. Corners are `[column, row]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WindowBox {
    /// The first place of a window's first pixel, from the image's first pixel.
    pub lower: [i32; 2],
    /// The last, from the image's last pixel.
    pub upper: [i32; 2],
}

impl TensorMapSpec {
    /// Bytes that one copy brings to shared memory: what a barrier has to expect.
    pub fn box_bytes(&self) -> u64 {
        let taken = self.box_sizes.iter().zip(&self.element_strides);
        let elements: u64 =
            taken.map(|(size, step)| u64::from(size.div_ceil((*step).max(1)))).product();
        elements * u64::from(self.element.bytes())
    }

    /// The rule of the accelerator that this breaks, if any. (The driver says only "invalid value".)
    pub fn problem(&self) -> Option<String> {
        let rank = self.sizes.len();
        let bytes = u64::from(self.element.bytes());
        if !(1..=5).contains(&rank) {
            return Some(format!("{rank} dimensions, and a map has 1 to 5"));
        }
        let lists =
            [self.strides_bytes.len() + 1, self.box_sizes.len(), self.element_strides.len()];
        if lists.iter().any(|len| *len != rank) {
            return Some("the lists do not have one entry per dimension".into());
        }
        if self.address == 0 || !self.address.is_multiple_of(16) {
            return Some(format!("address {:#x} is not a multiple of 16", self.address));
        }
        if let Some(size) = self.sizes.iter().find(|size| **size == 0 || **size > 1 << 32) {
            return Some(format!("size {size} is not in 1 to 2^32"));
        }
        let wrong = |stride: &&u64| !stride.is_multiple_of(16) || **stride >= 1 << 40;
        if let Some(stride) = self.strides_bytes.iter().find(wrong) {
            return Some(format!("stride {stride} is not a multiple of 16 below 2^40"));
        }
        if let Some(size) = self.box_sizes.iter().find(|size| !(1..=256).contains(*size)) {
            return Some(format!("box size {size} is not in 1 to 256"));
        }
        if let Some(step) = self.element_strides.iter().find(|step| !(1..=8).contains(*step)) {
            return Some(format!("element stride {step} is not in 1 to 8"));
        }
        let inner = u64::from(self.box_sizes[0]) * bytes;
        if !inner.is_multiple_of(16) {
            return Some(format!("the box's inner side has {inner} bytes, not a multiple of 16"));
        }
        if let Some(span) = self.swizzle.span_bytes().filter(|span| inner > u64::from(*span)) {
            return Some(format!(
                "the box's inner side has {inner} bytes, the swizzle spans {span}"
            ));
        }
        if let Some(windows) = &self.windows {
            if rank != 4 || self.box_sizes[2..] != [1, 1] {
                return Some("windows are over images of four dimensions".into());
            }
            let mut corners = windows.lower.iter().chain(&windows.upper);
            if corners.any(|c| !(-128..=127).contains(c)) {
                return Some(format!("corners of windows {windows:?} are not in -128 to 127"));
            }
        }
        if self.oob_fill == OobFill::Nan && !self.element.is_float() {
            return Some("integers cannot be filled with NaN".into());
        }
        None
    }
}

/// A map in the accelerator's own form. A kernel takes it by value, as
/// `const __grid_constant__ CUtensorMap`.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C, align(128))]
pub struct TensorMap([u8; 128]);

impl TensorMap {
    /// Encodes a map for a device.
    pub fn encode(gpu: &Gpu, spec: &TensorMapSpec) -> Result<TensorMap> {
        let refused = |message: String| {
            Error::bug(format!("tensor map: {message}")).with_note(format!("{spec:?}"))
        };
        if gpu.properties().major < 9 {
            let message = format!("{} has no tensor memory accelerator", gpu.properties().name);
            return Err(Error::unsupported(message));
        }
        if let Some(problem) = spec.problem() {
            return Err(refused(problem));
        }
        use sys::CUtensorMapFloatOOBfill as F;
        use sys::CUtensorMapL2promotion as L;
        use sys::CUtensorMapSwizzle as S;
        let swizzle = match spec.swizzle {
            Swizzle::None => S::CU_TENSOR_MAP_SWIZZLE_NONE,
            Swizzle::B32 => S::CU_TENSOR_MAP_SWIZZLE_32B,
            Swizzle::B64 => S::CU_TENSOR_MAP_SWIZZLE_64B,
            Swizzle::B128 => S::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        let l2_promotion = match spec.l2_promotion {
            L2Promotion::None => L::CU_TENSOR_MAP_L2_PROMOTION_NONE,
            L2Promotion::B64 => L::CU_TENSOR_MAP_L2_PROMOTION_L2_64B,
            L2Promotion::B128 => L::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            L2Promotion::B256 => L::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        };
        let oob_fill = match spec.oob_fill {
            OobFill::Zero => F::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            OobFill::Nan => F::CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA,
        };
        gpu.make_current()?;
        let mut map = TensorMap([0; 128]);
        let code = match &spec.windows {
            // SAFETY: 128 bytes at a multiple of 64 for the map, and lists as long as the rank says (the strides one
            // shorter, corners two for the four dimensions), which `problem` checked. The address is only written down.
            Some(windows) => unsafe {
                (gpu.0.api.tensor_map_encode_im2col)(
                    (&raw mut map).cast(),
                    spec.element.row().1,
                    spec.sizes.len() as u32,
                    std::ptr::with_exposed_provenance_mut(spec.address as usize),
                    spec.sizes.as_ptr(),
                    spec.strides_bytes.as_ptr(),
                    windows.lower.as_ptr(),
                    windows.upper.as_ptr(),
                    spec.box_sizes[0],
                    spec.box_sizes[1],
                    spec.element_strides.as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle,
                    l2_promotion,
                    oob_fill,
                )
            },
            // SAFETY: as above, without corners.
            None => unsafe {
                (gpu.0.api.tensor_map_encode_tiled)(
                    (&raw mut map).cast(),
                    spec.element.row().1,
                    spec.sizes.len() as u32,
                    std::ptr::with_exposed_provenance_mut(spec.address as usize),
                    spec.sizes.as_ptr(),
                    spec.strides_bytes.as_ptr(),
                    spec.box_sizes.as_ptr(),
                    spec.element_strides.as_ptr(),
                    sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle,
                    l2_promotion,
                    oob_fill,
                )
            },
        };
        if code == 0 {
            Ok(map)
        } else {
            Err(gpu.0.api.error(code, "encoding a tensor map").with_note(format!("{spec:?}")))
        }
    }

    /// Its bytes, as a kernel takes them.
    pub fn bytes(&self) -> &[u8; 128] {
        &self.0
    }
}

impl fmt::Debug for TensorMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TensorMap(128 bytes)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> TensorMapSpec {
        TensorMapSpec {
            element: MapElement::BF16,
            address: 4096,
            sizes: vec![640, 1000],
            strides_bytes: vec![1280],
            box_sizes: vec![64, 128],
            element_strides: vec![1, 1],
            swizzle: Swizzle::B128,
            l2_promotion: L2Promotion::B256,
            oob_fill: OobFill::Zero,
            windows: None,
        }
    }

    #[test]
    fn every_rule_is_checked() {
        assert_eq!(spec().problem(), None);
        assert_eq!(spec().box_bytes(), 16384);
        let windows = |lower| Some(WindowBox { lower, upper: [0, 0] });
        let images = TensorMapSpec {
            sizes: vec![640, 8, 8, 2],
            strides_bytes: vec![1280, 10240, 81920],
            box_sizes: vec![64, 128, 1, 1],
            element_strides: vec![1, 2, 2, 1],
            windows: windows([-1, -1]),
            ..spec()
        };
        assert_eq!(images.problem(), None);
        let rules: [(&str, TensorMapSpec); 12] = [
            ("-129", TensorMapSpec { windows: windows([-129, 0]), ..images.clone() }),
            ("four dimensions", TensorMapSpec { windows: windows([0, 0]), ..spec() }),
            ("dimensions", TensorMapSpec { sizes: vec![], ..spec() }),
            ("one entry per", TensorMapSpec { strides_bytes: vec![], ..spec() }),
            ("multiple of 16", TensorMapSpec { address: 4104, ..spec() }),
            ("size 0", TensorMapSpec { sizes: vec![640, 0], ..spec() }),
            ("stride 1288", TensorMapSpec { strides_bytes: vec![1288], ..spec() }),
            ("box size 257", TensorMapSpec { box_sizes: vec![64, 257], ..spec() }),
            ("element stride 9", TensorMapSpec { element_strides: vec![1, 9], ..spec() }),
            ("8 bytes", TensorMapSpec { box_sizes: vec![4, 8], ..spec() }),
            ("swizzle spans 64", TensorMapSpec { swizzle: Swizzle::B64, ..spec() }),
            ("NaN", TensorMapSpec { element: MapElement::U16, oob_fill: OobFill::Nan, ..spec() }),
        ];
        for (words, spec) in rules {
            let problem = spec.problem().unwrap_or_default();
            assert!(problem.contains(words), "{words}: {problem}");
        }
    }

    #[test]
    fn the_map_is_as_large_and_aligned_as_the_driver_s() {
        assert_eq!(size_of::<TensorMap>(), size_of::<sys::CUtensorMap>());
        assert!(align_of::<TensorMap>() >= 64);
        for (dtype, _, _, bits) in DType::TABLE {
            match MapElement::of(dtype) {
                Some(element) => assert_eq!(element.bytes() * 8, bits, "{dtype}"),
                None => assert_eq!(bits, 4, "{dtype}"),
            }
        }
    }
}
