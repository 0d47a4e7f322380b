//! Records of tuned products: what is used, and that what is damaged, foreign or impossible is not.

use std::path::{Path, PathBuf};
use tilewright_base::DType;
use tilewright_kernels::gemm::{
    Device, FORMAT, Key, Knobs, Problem, Record, Records, Source, candidate, choices, code_of,
    picked, plan_untuned, plan_with,
};
use tilewright_target::Gpu;

fn problem() -> Problem {
    Problem::dense(1000, 1000, 1000, DType::BF16, DType::BF16)
}

/// A record of a choice that the model would not take.
fn record(problem: &Problem, gpu: &Gpu) -> Record {
    let first = picked(problem, gpu).unwrap().unwrap();
    let all = choices(problem, gpu).unwrap();
    let other = |c: &&_| Knobs::of(c).tile != Knobs::of(&first).tile;
    let choice = all
        .iter()
        .filter(other)
        .find(|c| candidate(problem, c).unwrap().is_some())
        .expect("there are other tiles");
    Record {
        format: FORMAT,
        problem: Key::of(problem),
        device: Device::of(gpu),
        driver: "580.1".into(),
        nvrtc: "13.0".into(),
        code: code_of(&candidate(problem, choice).unwrap().unwrap()).unwrap(),
        choice: Some(Knobs::of(choice)),
        us: 7.25,
        picker_us: 9.75,
        error: 1.7e-3,
        trials: 150,
        date: "2026-11-21T16:00:00Z".into(),
    }
}

/// What a list of lines makes of the problem's plan: the source, and the warnings.
fn planned(lines: &str) -> (Source, Vec<String>) {
    let mut records = Records::none();
    records.add_lines("list", lines);
    let planned = plan_with(&problem(), &Gpu::h200(), 3, &records).unwrap();
    assert_eq!(planned.candidates.len(), 3);
    (planned.source, [records.warnings().to_vec(), planned.warnings].concat())
}

#[track_caller]
fn is_left_out(lines: &str, why: &str) {
    let (source, warnings) = planned(lines);
    assert_eq!(source, Source::Model);
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    assert!(warnings[0].contains(why), "{warnings:?}");
}

#[test]
fn a_record_comes_before_the_model() {
    let (problem, gpu) = (problem(), Gpu::h200());
    let record = record(&problem, &gpu);
    let mut records = Records::none();
    records.add_lines("list", &record.line().unwrap());
    let planned = plan_with(&problem, &gpu, 3, &records).unwrap();
    assert_eq!(planned.warnings, Vec::<String>::new());
    assert!(planned.source.to_string().contains("7.25 us, 9.75 us for the model's pick"));
    assert_eq!(planned.source, Source::Record(Box::new(record.clone())));
    let [bm, bn, bk] = record.choice.unwrap().tile;
    let tiles = &planned.candidates[0].steps[0].schedule.tiles;
    assert_eq!((tiles["BM"], tiles["BN"], tiles["BK"]), (bm, bn, bk));
    // Then those of the model.
    let untuned = plan_untuned(&problem, &gpu, 3).unwrap();
    assert_eq!(untuned[0].steps[0].schedule, planned.candidates[1].steps[0].schedule);
    // Of another problem nothing is said.
    let other = Problem::dense(1000, 1000, 1001, DType::BF16, DType::BF16);
    assert_eq!(plan_with(&other, &gpu, 1, &records).unwrap().source, Source::Model);
}

#[test]
fn every_field_of_a_problem_counts() {
    let base = problem();
    let key = Key::of(&base);
    let changed: [fn(&mut Problem); 12] = [
        |p| p.m += 1,
        |p| p.n += 1,
        |p| p.k += 1,
        |p| p.batch = 2,
        |p| p.operand = DType::F16,
        |p| p.result = DType::F32,
        |p| p.promoted = true,
        |p| p.order.1 = tilewright_kernels::gemm::Order::Col,
        |p| p.leading.0 += 8,
        |p| p.align.2 = 8,
        |p| p.precision = tilewright_kernels::gemm::Precision::Tf32,
        |p| {
            p.epilogue = tilewright_kernels::gemm::Epilogue::bias(None, DType::F32, DType::BF16);
        },
    ];
    for (at, change) in changed.iter().enumerate() {
        let mut other = base.clone();
        change(&mut other);
        assert_ne!(Key::of(&other), key, "change {at}");
        assert_ne!(Key::of(&other).hash(), key.hash(), "change {at}");
    }
    // Strides of a single product and alignments beyond what is used are the same problem.
    let mut same = base.clone();
    (same.stride, same.align) = ((7, 7, 7), (64, 512, 128));
    assert_eq!(Key::of(&same), key);
}

#[test]
fn what_is_damaged_foreign_or_impossible_is_left_out() {
    let (problem, gpu) = (problem(), Gpu::h200());
    let good = record(&problem, &gpu);
    let line = good.line().unwrap();
    assert!(matches!(planned(&line).0, Source::Record(_)));
    is_left_out(&line[..line.len() / 2], "list, line 1: no record");
    is_left_out("\0\u{ffff}", "no record");
    is_left_out("[1, 2]", "no record");
    is_left_out(&line.replace("\"format\":1", "\"format\":2"), "format 2");
    is_left_out(&line.replace("\"us\":7.25", "\"us\":-1.0"), "time -1");
    is_left_out(&line.replace("\"trials\"", "\"attempts\""), "no record");
    let mut illegal = good.clone();
    illegal.choice.as_mut().unwrap().tile = [128, 250, 64];
    is_left_out(&illegal.line().unwrap(), "128x250x64 wgmma");
    illegal = good.clone();
    illegal.choice.as_mut().unwrap().stages = 1000;
    is_left_out(&illegal.line().unwrap(), "no schedule of this problem");
    let mut stale = good.clone();
    stale.code = "0".repeat(32);
    is_left_out(&stale.line().unwrap(), "have changed");
    // Records of other devices concern nobody here.
    for change in [|d: &mut Device| d.name = "NVIDIA H100".into(), |d: &mut Device| d.sms = 114] {
        let mut foreign = good.clone();
        change(&mut foreign.device);
        assert_eq!(planned(&foreign.line().unwrap()), (Source::Model, Vec::new()));
    }
}

/// A folder of its own, gone at the end.
struct Temp(PathBuf);

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn the_file_of_a_user_comes_before_the_programs_and_a_bad_one_does_not_hide_them() {
    let (problem, gpu) = (problem(), Gpu::h200());
    let shipped = record(&problem, &gpu);
    let mut own = shipped.clone();
    own.trials = 9;
    let temp =
        Temp(std::env::temp_dir().join(format!("tilewright-records-{}", std::process::id())));
    let path = Record::path(&temp.0, &own.device, &own.problem);
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut records = Records::none().with_folder(temp.0.clone());
    records.add(shipped);
    let trials = |records: &Records| {
        let planned = plan_with(&problem, &gpu, 1, records).unwrap();
        let Source::Record(record) = planned.source else { panic!("{planned:?}") };
        (record.trials, planned.warnings.join("; "))
    };
    let write = |path: &Path, text: &str| std::fs::write(path, text).unwrap();
    assert_eq!(trials(&records), (150, String::new()));
    write(&path, &own.line().unwrap());
    assert_eq!(trials(&records), (9, String::new()));
    own.problem.m = 7;
    for text in ["{", &own.line().unwrap()] {
        write(&path, text);
        let (count, warning) = trials(&records);
        assert!(count == 150 && warning.contains("is not used"), "{warning}");
    }
    std::fs::write(&path, [0xff, 0xfe, 0x00]).unwrap();
    assert!(trials(&records).1.contains("no record"));
}

#[test]
fn the_programs_own_records_are_whole() {
    let records = Records::shipped();
    assert_eq!(records.warnings(), Vec::<String>::new());
    for record in records.iter() {
        assert!(record.us <= record.picker_us * 1.05, "{} is slower than the pick", record.problem);
    }
}
