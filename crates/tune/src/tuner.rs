//! [`Tuner`]: a device, and all that tuning one product on it takes.

use crate::device::{Ahead, Closing, OnDevice, Watch};
use crate::products::Products;
use crate::search::{Arm, Found, Options, Timed, first_points, search};
use crate::store::{Conditions, Store};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tilewright_base::{Error, Result};
use tilewright_bench_gpu::arms::{Ours, PEER_WORKSPACE_BYTES, Peer, describe, planner_gpu};
use tilewright_bench_gpu::case::Case;
use tilewright_bench_gpu::ending::unit;
use tilewright_bench_gpu::measure::{Sets, check_peer};
use tilewright_bench_gpu::record::{ERROR_RATIO_MAX, now, nvidia_smi};
use tilewright_bench_gpu::support::Support;
use tilewright_cuda::peer::CublasLt;
use tilewright_cuda::{Buffer, Gpu, Nvrtc, Stream, driver_version};
use tilewright_kernels::gemm::{
    Candidate, Device, FORMAT, Key, Record, Records, candidate, code_of, plan_untuned,
};
use tilewright_launch::{Loader, first_that_works};

/// A device, open for tuning.
pub struct Tuner {
    stream: Stream,
    support: Support,
    loader: Loader,
    peer: Option<CublasLt>,
    workspace: Buffer,
    target: tilewright_target::Gpu,
    driver: String,
    nvrtc: String,
    on_hang: fn(&str),
}

/// What came of a product.
#[derive(Debug)]
pub struct Tuned {
    /// What was found, unless nothing was right.
    pub record: Option<Record>,
    /// How.
    pub found: Found,
    /// Size of the space.
    pub choices: usize,
    /// What the model picks alone.
    pub picked: String,
    /// Wrong results, with the schedules that gave them.
    pub wrong: Vec<String>,
    /// Where the record is.
    pub path: Option<PathBuf>,
    /// Seconds that it took.
    pub seconds: f64,
}

impl std::fmt::Debug for Tuner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Tuner({})", self.target.name)
    }
}

/// Choices of records of similar sizes that are tried first.
const NEAR_RECORDS: usize = 4;

impl Tuner {
    /// Opens a device. `on_hang` is called, from another thread, with a schedule that does not end; it should end the
    /// process.
    ///
    /// # Errors
    /// Unsupported without a driver, a device or NVRTC.
    pub fn open(ordinal: u32, cache: Option<&Path>, on_hang: fn(&str)) -> Result<Tuner> {
        let gpu = Gpu::open(ordinal)?;
        let nvrtc = Nvrtc::open(cache)?;
        let stream = gpu.stream()?;
        let pair = |(major, minor): (u32, u32)| format!("{major}.{minor}");
        let of_smi = nvidia_smi(&["driver_version"]).remove("driver_version");
        let of_smi = of_smi.and_then(|v| v.as_str().map(str::to_owned));
        Ok(Tuner {
            support: Support::new(&gpu, &nvrtc)?,
            peer: CublasLt::open(&gpu).ok(),
            workspace: stream.alloc(PEER_WORKSPACE_BYTES)?,
            target: planner_gpu(&gpu),
            driver: of_smi.map_or_else(|| driver_version().map(pair), Ok)?,
            nvrtc: pair(nvrtc.version()),
            loader: Loader::new(gpu, nvrtc),
            stream,
            on_hang,
        })
    }

    /// The device as the planner sees it.
    pub fn target(&self) -> &tilewright_target::Gpu {
        &self.target
    }

    /// Whether the device is of no use any more: a kernel faulted.
    pub fn is_lost(&self) -> bool {
        self.stream.synchronize().is_err()
    }

    /// Compiles what [`Tuner::tune`] will time first, for at most the seconds of the options; how many choices, of how many.
    ///
    /// # Errors
    /// What the planner says.
    pub fn prepare(&self, case: &Case, options: &Options) -> Result<(usize, usize)> {
        let began = Instant::now();
        let problem = case.problem();
        let products = Products::new(&problem, &self.target)?;
        let mut points = first_points(&products.space, products.picked, options);
        points.extend(products.picked);
        let ahead = Ahead::new(&problem, &products, &self.loader);
        ahead.announce(&points);
        let made = ahead.make_all(began + Duration::from_secs_f64(options.seconds));
        Ok((made, points.len()))
    }

    /// Searches, and keeps record and timings in `store`. `known` gives choices to begin with: records that are out
    /// of date, and those of similar sizes.
    ///
    /// # Errors
    /// What the planner says; or when the device is of no use any more.
    pub fn tune(
        &self,
        case: &Case,
        store: &Store,
        known: &Records,
        options: &Options,
    ) -> Result<Tuned> {
        let began = Instant::now();
        let problem = case.problem();
        let products = Products::new(&problem, &self.target)?;
        let plans = plan_untuned(&problem, &self.target, 4)?;
        if plans.iter().all(|plan| plan.steps.is_empty()) {
            return Err(Error::user("an empty product has nothing to tune"));
        }
        let taken = first_that_works(&plans, |plan| {
            Ours::load(&self.loader, &self.stream, plan).map(drop)
        })?;
        let baseline = &plans[taken.index];
        let same = |p: &usize| {
            let made = candidate(&problem, &products.choices[*p]);
            made.is_ok_and(|m| m.is_some_and(|m| describe(&m) == describe(baseline)))
        };
        let picked = products.picked.filter(same);
        let key = Key::of(&problem);
        let device = Device::of(&self.target);
        let conditions = Conditions {
            format: FORMAT,
            problem: key.clone(),
            device: device.clone(),
            driver: self.driver.clone(),
            nvrtc: self.nvrtc.clone(),
            code: code_of(baseline)?,
        };
        let earlier: Vec<(usize, Timed)> = store
            .trials_of(&conditions)
            .into_iter()
            .filter_map(|(knobs, timed)| Some((products.named(&knobs)?, timed)))
            .collect();
        let own = known.clone().with_folder(store.folder().to_owned());
        let out_of_date = own.find(&self.target, &key).0;
        let near = out_of_date.iter().chain(own.near(&device, &key, NEAR_RECORDS));
        let seeds = near.filter_map(|r| products.named(r.choice.as_ref()?)).collect();
        let options = Options { seeds, ..options.clone() };

        let sets = Sets::new(&self.stream, &self.support, case)?;
        // At most this many operations of the reference per check.
        let rows = (2_000_000_000 / (case.n * case.k).max(1)).clamp(8, 256);
        let ahead = Ahead::new(&problem, &products, &self.loader);
        let watch = Watch::default();
        let mut measure = OnDevice {
            stream: &self.stream,
            support: &self.support,
            loader: &self.loader,
            sets: &sets,
            products: &products,
            baseline,
            ahead: &ahead,
            watch: &watch,
            rows,
            allowed: self.allowed(case, &sets, rows)?,
            began,
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let found = std::thread::scope(|scope| {
            let closing = Closing(&ahead, &watch);
            scope.spawn(|| watch.work(self.on_hang));
            for _ in 1..threads.max(2) {
                scope.spawn(|| ahead.work());
            }
            let found = search(&products.space, picked, &earlier, &mut measure, &options);
            drop(closing);
            found
        })?;

        let name = |arm: Arm| match arm {
            Arm::Baseline => describe(baseline),
            Arm::Point(p) => products.knobs[p].to_string(),
        };
        let wrong = found.wrong.iter().map(|(arm, why)| format!("{}: {why}", name(*arm))).collect();
        let trials: Vec<_> =
            found.trials.iter().map(|(p, t)| (products.knobs[*p].clone(), t.clone())).collect();
        store.save_trials(&conditions, &trials)?;
        let mut record = None;
        if let Some((arm, us, error)) = found.best {
            let made: Candidate = match arm {
                Arm::Baseline => baseline.clone(),
                Arm::Point(p) => candidate(&problem, &products.choices[p])?
                    .ok_or_else(|| Error::bug("a choice that ran cannot be lowered"))?,
            };
            let point = match arm {
                Arm::Baseline => picked,
                Arm::Point(p) => Some(p),
            };
            record = Some(Record {
                format: FORMAT,
                problem: key,
                device,
                driver: self.driver.clone(),
                nvrtc: self.nvrtc.clone(),
                code: code_of(&made)?,
                choice: point.map(|p| products.knobs[p].clone()),
                us: rounded(us),
                picker_us: rounded(found.baseline_us.unwrap_or(us)),
                error,
                trials: found.trials.len() as u32,
                date: now(),
            });
        }
        let path = record.as_ref().map(|record| store.save(record)).transpose()?;
        Ok(Tuned {
            record,
            choices: products.space.len(),
            picked: describe(baseline),
            wrong,
            found,
            path,
            seconds: began.elapsed().as_secs_f64(),
        })
    }

    /// The greatest error that counts as right: twice cuBLASLt's, or what rounding to the result's type may cost.
    fn allowed(&self, case: &Case, sets: &Sets, rows: u64) -> Result<f64> {
        let numbers = case.numbers;
        if !case.c.dtype.is_float() {
            return Ok(0.0);
        }
        let of_peer = self.peer.as_ref().and_then(|peer| {
            let peer = Peer::new(peer, &self.loader, case, &self.workspace).ok()?;
            check_peer(&self.stream, &self.support, sets, &peer, rows).ok()
        });
        self.stream.synchronize()?;
        Ok(match of_peer {
            Some(error) => (ERROR_RATIO_MAX * error).max(unit(case.c.dtype)),
            None => numbers.lone_error_max(),
        })
    }
}

/// Three digits behind the point: a nanosecond.
fn rounded(us: f64) -> f64 {
    (us * 1000.0).round() / 1000.0
}
