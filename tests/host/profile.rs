//! Curves say what was measured and what lies between; a profile of another machine, model or format is refused in words.

use fulmen::checkpoint::Synthetic;
use fulmen::model::presets::preset;
use fulmen::plan::presets::hardware;
use fulmen::policy::Precision;
use fulmen::profile::{Contention, Curve, Profile, ProfileError, Surface};
use proptest::prelude::*;

fn curve(points: &[(f64, f64)]) -> Curve {
    Curve::try_from(points.to_vec()).expect("a curve")
}

fn profile() -> Profile {
    let config = preset("mixtral-8x7b").expect("a shape");
    hardware("t4").expect("a machine").profile(Synthetic::new(config).inventory())
}

#[test]
fn a_curve_is_straight_between_its_points() {
    let curve = curve(&[(10.0, 1.0), (20.0, 3.0), (40.0, 4.0)]);
    for (x, y) in [(0.0, 0.0), (1.0, 1.0), (10.0, 1.0), (15.0, 2.0), (20.0, 3.0), (30.0, 3.5), (40.0, 4.0), (80.0, 8.0)]
    {
        assert!((curve.at(x) - y).abs() < 1e-12, "{x}: {} instead of {y}", curve.at(x));
    }
    assert_eq!(curve.scaled(2.0).at(15.0), 4.0);
}

#[test]
fn noise_that_falls_is_shared_out() {
    let noisy = vec![(1.0, 2.2), (2.0, 1.8), (3.0, 3.0), (4.0, 2.5), (5.0, 2.6), (6.0, 9.0)];
    let shared = [(1.0, 2.0), (2.0, 2.0), (3.0, 2.7), (4.0, 2.7), (5.0, 2.7), (6.0, 9.0)];
    let rising = Curve::rising(noisy).expect("a curve");
    assert!(rising.points().iter().zip(shared).all(|(one, other)| (one.1 - other.1).abs() < 1e-12), "{rising:?}");
    // Experts as they were once measured on an H200, milliseconds over rows: something else took its time at 1536.
    let spike = vec![(1024.0, 6.3), (1536.0, 34.9), (2048.0, 9.8), (3072.0, 14.8), (4096.0, 20.1)];
    let rising = Curve::rising(spike).expect("a curve");
    assert_eq!(rising.points(), [(1024.0, 6.3), (1536.0, 9.8), (2048.0, 9.8), (3072.0, 14.8), (4096.0, 20.1)]);
}

#[test]
fn a_line_has_its_latency_and_its_rate() {
    let line = Curve::linear(1e-3, 1e9);
    for (bytes, seconds) in [(1.0, 1e-3), (1e6, 2e-3), (1e9, 1.001), (1e12, 1000.0)] {
        assert!((line.at(bytes) / seconds - 1.0).abs() < 2e-3, "{bytes}: {}", line.at(bytes));
    }
}

#[test]
fn a_surface_is_straight_between_its_curves() {
    let surface = Surface::try_from(vec![(100.0, curve(&[(1.0, 1.0), (3.0, 3.0)])), (200.0, curve(&[(1.0, 3.0)]))])
        .expect("a surface");
    for (x, z, y) in [(2.0, 50.0, 2.0), (2.0, 100.0, 2.0), (2.0, 150.0, 4.0), (2.0, 200.0, 6.0), (2.0, 400.0, 12.0)] {
        assert!((surface.at(x, z) - y).abs() < 1e-12, "{x}, {z}: {}", surface.at(x, z));
    }
}

/// Attention at 80 GB/s and pages at 40 got 100 together: 64 and 36. What asks for 20 more than there is, in all, slows down.
#[test]
fn memory_is_contended_by_what_asks_for_more_than_there_is() {
    let contention = Contention {
        pages_beside_attention: 40.0 / 36.0,
        attention_beside_pages: 80.0 / 64.0,
        attention_bytes_per_s: 80e9,
        page_bytes_per_s: 40e9,
        ..Contention::NONE
    };
    let close = |one: (f64, f64), other: (f64, f64)| (one.0 - other.0).abs() < 1e-12 && (one.1 - other.1).abs() < 1e-12;
    assert!(close(contention.of_attention(1.0), (40.0 / 36.0, 1.25)));
    assert!(close(contention.of_attention(2.0), (40.0 / 36.0, 1.25)), "never more than was measured");
    assert!(close(contention.of_attention(0.875), (1.0 + 0.5 / 9.0, 1.125)), "10 of 20 too many");
    assert!(close(contention.of_attention(0.75), (1.0, 1.0)), "60 and 40 is what there is");
    assert!(close(contention.of_attention(0.0), (1.0, 1.0)));
    let unknown = Contention { attention_bytes_per_s: 0.0, page_bytes_per_s: 0.0, ..contention };
    assert!(close(unknown.of_attention(0.1), (40.0 / 36.0, 1.25)), "a profile that does not say when");
}

#[test]
fn what_is_no_curve_is_refused() {
    for points in [
        vec![],
        vec![(1.0, 1.0), (1.0, 2.0)],
        vec![(2.0, 1.0), (1.0, 2.0)],
        vec![(1.0, f64::NAN)],
        vec![(0.0, 1.0)],
        vec![(1.0, -1.0)],
    ] {
        assert!(Curve::try_from(points.clone()).is_err(), "{points:?}");
    }
    // Also in a file.
    let mut value = serde_json::to_value(profile()).expect("plain data");
    value["gpu"]["experts"] = serde_json::json!([[2.0, 1.0], [1.0, 2.0]]);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("profile.json");
    std::fs::write(&path, value.to_string()).expect("a file");
    let error = Profile::read(&path).expect_err("a curve that goes back").to_string();
    assert!(error.contains("point 1 of a curve"), "{error}");
}

#[test]
fn a_profile_comes_back_from_its_file() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("below").join("profile.json");
    profile().write(&path).expect("written");
    let (back, was) = (Profile::read(&path).expect("read"), profile());
    assert_eq!((&back.machine, &back.model, &back.memory), (&was.machine, &was.model, &was.memory));
    // JSON keeps a number to its last digit or next to it.
    let near = |one: &Curve, other: &Curve| {
        let close = |(a, b): (&(f64, f64), &(f64, f64))| (a.1 - b.1).abs() <= 1e-14 * a.1.abs();
        one.points().len() == other.points().len() && one.points().iter().zip(other.points()).all(close)
    };
    assert!(near(&back.gpu.experts, &was.gpu.experts) && near(&back.link.to_host, &was.link.to_host));
    assert!(near(&back.gpu.decode_attention.curves()[1].1, &was.gpu.decode_attention.curves()[1].1));
    assert_eq!(
        serde_json::to_string(&back.contention).expect("JSON"),
        serde_json::to_string(&was.contention).expect("JSON")
    );
    // Nothing is left of the writing.
    assert_eq!(std::fs::read_dir(path.parent().expect("a folder")).expect("a folder").count(), 1);
}

#[test]
fn another_format_is_refused_before_it_is_read() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("profile.json");
    std::fs::write(&path, r#"{"version": 77, "nothing": "of ours"}"#).expect("a file");
    let error = Profile::read(&path).expect_err("a profile of the future");
    assert!(matches!(error, ProfileError::Version { found: 77, .. }), "{error}");
    assert!(error.to_string().contains("format 77"), "{error}");
    let missing = Profile::read(&folder.path().join("none.json")).expect_err("no file").to_string();
    assert!(missing.contains("none.json"), "{missing}");
}

#[test]
fn another_machine_is_refused_with_what_differs() {
    let profile = profile();
    let mut machine = profile.machine.clone();
    profile.check(&machine, &profile.model).expect("its own machine");
    machine.driver = "2.0".into();
    machine.threads = 7;
    let error = profile.check(&machine, &profile.model).expect_err("another driver").to_string();
    for words in ["another machine", "driver none: a data sheet (here: 2.0)", "threads 1 (here: 7)", "fulmen calibrate"]
    {
        assert!(error.contains(words), "'{words}' in: {error}");
    }
    assert!(!error.contains("adapter"), "what is the same is not told: {error}");
}

#[test]
fn another_kind_of_layers_is_refused_but_not_another_number() {
    let profile = profile();
    let key = |name: &str, layers: Option<usize>| {
        let mut config = preset(name).expect("a shape");
        config.keep_layers(layers.unwrap_or(config.shape.layers));
        fulmen::profile::ModelKey::of(Synthetic::new(config).inventory(), Precision::F16)
    };
    profile.check(&profile.machine, &key("mixtral-8x7b", Some(3))).expect("three layers of the same kind");
    let error = profile.check(&profile.machine, &key("mixtral-8x22b", None)).expect_err("wider layers").to_string();
    assert!(error.contains("kind of model") && error.contains("d_model 4096 (here: 6144)"), "{error}");
}

proptest! {
    /// A rising curve never falls, whatever was measured and wherever it is asked.
    #[test]
    fn rising_curves_rise(
        values in prop::collection::vec(0.0..10.0f64, 1..12),
        asked in prop::collection::vec(0.0..40.0f64, 2..20),
    ) {
        let points: Vec<(f64, f64)> = values.iter().enumerate().map(|(i, y)| (2.0 * i as f64 + 1.0, *y)).collect();
        let mean = |points: &[(f64, f64)]| points.iter().map(|point| point.1).sum::<f64>();
        let curve = Curve::rising(points.clone()).expect("a curve");
        // What was disturbed goes; of the others nothing is lost.
        let disturbed = |(i, point): (usize, &(f64, f64))| points[i..].iter().any(|later| point.1 > 1.25 * later.1);
        let (before, after) = (mean(&points), mean(curve.points()));
        prop_assert!(after <= before + 1e-9);
        prop_assert!(points.iter().enumerate().any(disturbed) || (after - before).abs() < 1e-9, "{after} of {before}");
        let mut asked = asked;
        asked.sort_by(f64::total_cmp);
        for pair in asked.windows(2) {
            prop_assert!(curve.at(pair[0]) <= curve.at(pair[1]) + 1e-12, "{pair:?}");
        }
    }
}
