use fulmen::kernels::half_rows::{
    ByExpert, HalfRows, Params, groups, padded, record, record_between, record_by_expert,
};
use fulmen::reference::half_rows::{half_rows, place_by_expert};
use half::f16;
use libtest_mimic::Trial;

use crate::common::{Random, assert_untouched, bits, download, poisoned, run, upload};

/// Halves and scales, as the kernel has them. What lies behind them stayed untouched.
fn halved(x: &[f32], params: Params) -> (Vec<f16>, Vec<f32>) {
    let n = (params.n_rows * params.n_padded) as usize;
    let n_rows = params.n_rows as usize;
    let (x, rows, scales) = (upload(x), poisoned(n / 2 + 70), poisoned(n_rows + 70));
    run(|recorder| record(recorder, params, x.whole(), HalfRows { rows: rows.whole(), scales: scales.whole() }));
    let (rows, scales): (Vec<u32>, Vec<u32>) = (download(rows.whole()), download(scales.whole()));
    (n / 2..rows.len()).for_each(|i| assert_untouched("half_rows", &rows, i));
    (n_rows..scales.len()).for_each(|i| assert_untouched("half_rows' scales", &scales, i));
    (bytemuck::pod_collect_to_vec(&rows[..n / 2]), bytemuck::pod_collect_to_vec(&scales[..n_rows]))
}

fn same(what: &str, (halves, scales): &(Vec<f16>, Vec<f32>), (want, want_scales): &(Vec<f16>, Vec<f32>)) {
    assert_eq!(bits(scales), bits(want_scales), "{what}: scales");
    for (i, (got, want)) in halves.iter().zip(want).enumerate() {
        let alike = got.to_bits() == want.to_bits() || got.is_nan() && want.is_nan();
        assert!(alike, "{what}: element {i} is {got}, reference {want}");
    }
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("half_rows::has_the_reference's_bits", || {
            for (n_rows, n_in) in [(0, 8), (1, 1), (3, 7), (2, 255), (5, 256), (4, 257), (2, 1000)] {
                let mut random = Random::new((n_rows * 1000 + n_in) as u64);
                // Rows of every magnitude, one of zeros, each with numbers that are subnormal f16 after scaling.
                let x: Vec<f32> = (0..n_rows * n_in)
                    .map(|i| match i / n_in {
                        1 => 0.0,
                        row => random.unit() * 10f32.powi([6, 0, -3, 30, -30][row] - (i % 9) as i32),
                    })
                    .collect();
                let params = Params::dense(n_rows as u32, n_in as u32);
                let want = half_rows(&x, n_in, padded(n_in as u32) as usize);
                same(&format!("{n_rows} rows of {n_in}"), &halved(&x, params), &want);
            }
            Ok(())
        }),
        Trial::test("half_rows::keeps_what_is_not_finite_in_its_row", || {
            let (n_rows, n_in) = (3, 70);
            let mut x = Random::new(5).values(n_rows * n_in);
            (x[n_in + 3], x[n_in + 4]) = (f32::NAN, f32::NEG_INFINITY);
            let got = halved(&x, Params::dense(n_rows as u32, n_in as u32));
            same("with NaN", &got, &half_rows(&x, n_in, padded(n_in as u32) as usize));
            assert!(got.0[padded(n_in as u32) as usize + 3].is_nan());
            Ok(())
        }),
        Trial::test("half_rows::between_bounds_takes_those_rows_alone", || {
            let (n_rows, n_in) = (7, 300);
            let n_padded = padded(n_in as u32) as usize;
            let x = Random::new(8).values(n_rows * n_in);
            let (want, want_scales) = half_rows(&x, n_in, n_padded);
            let bounds = [0u32, 2, 2, 5, 7];
            for [first, end] in [[0u32, 1], [1, 2], [1, 4], [2, 3], [0, 4]] {
                let (device_x, device_bounds) = (upload(&x), upload(&bounds));
                let (rows, scales) = (poisoned(n_rows * n_padded / 2), poisoned(n_rows));
                let halves = HalfRows { rows: rows.whole(), scales: scales.whole() };
                let params = Params::dense(n_rows as u32, n_in as u32);
                run(|r| record_between(r, params, [first, end], device_bounds.whole(), device_x.whole(), halves));
                let (rows, scales): (Vec<u32>, Vec<u32>) = (download(rows.whole()), download(scales.whole()));
                let taken = bounds[first as usize] as usize..bounds[end as usize] as usize;
                for row in 0..n_rows {
                    let words = row * n_padded / 2..(row + 1) * n_padded / 2;
                    if taken.contains(&row) {
                        let want = &want[row * n_padded..][..n_padded];
                        assert_eq!(
                            rows[words],
                            bytemuck::pod_collect_to_vec::<f16, u32>(want),
                            "row {row} of {taken:?}"
                        );
                        assert_eq!(scales[row], want_scales[row].to_bits(), "scale of row {row} of {taken:?}");
                    } else {
                        words.for_each(|i| assert_untouched("half_rows", &rows, i));
                        assert_untouched("half_rows' scales", &scales, row);
                    }
                }
            }
            Ok(())
        }),
        // Empty experts first, in between and last; one with exactly a group, one with more; of all experts and of some.
        Trial::test("half_rows::by_expert_lays_rows_out_as_fragments", || {
            let (n_experts, n_in, n_chosen) = (7, 300, 2);
            let counts = [0u32, 16, 3, 0, 21, 10, 0];
            let offsets: Vec<u32> = std::iter::once(0)
                .chain(counts.iter().scan(0, |sum, n| {
                    *sum += n;
                    Some(*sum)
                }))
                .collect();
            let n = offsets[n_experts] as usize;
            let n_padded = padded(n_in as u32) as usize;
            let in_groups = 16 * groups(n as u32, n_experts as u32) as usize * n_padded;
            // Any order will do.
            let permutation: Vec<u32> = (0..n as u32).map(|i| i * 7 % n as u32).collect();
            let x = Random::new(9).values(n * n_in);
            let (want, want_scales) = half_rows(&x, n_in, n_padded);
            let (device_x, device_offsets, device_permutation) = (upload(&x), upload(&offsets), upload(&permutation));
            for (experts, gathers) in
                [([0u32, 7], true), ([0, 7], false), ([1, 5], true), ([6, 7], true), ([4, 5], false)]
            {
                let (rows, scales) = (poisoned(in_groups / 2 + 70), poisoned(n + 70));
                let order = ByExpert {
                    n_experts: n_experts as u32,
                    experts,
                    offsets: device_offsets.whole(),
                    permutation: gathers.then(|| (device_permutation.whole(), n_chosen)),
                };
                let halves = HalfRows { rows: rows.whole(), scales: scales.whole() };
                let params = Params::dense(n as u32, n_in as u32);
                run(|r| record_by_expert(r, params, order, device_x.whole(), halves));
                let (rows, scales): (Vec<u32>, Vec<u32>) = (download(rows.whole()), download(scales.whole()));
                let taken = offsets[experts[0] as usize] as usize..offsets[experts[1] as usize] as usize;
                let mut written = vec![false; rows.len()];
                for position in 0..n {
                    if !taken.contains(&position) {
                        assert_untouched("scales by expert", &scales, position);
                        continue;
                    }
                    let row = if gathers { (permutation[position] / n_chosen) as usize } else { position };
                    assert_eq!(scales[position], want_scales[row].to_bits(), "scale of {position}, {experts:?}");
                    for k in (0..n_padded).step_by(2) {
                        let at = place_by_expert(&offsets, position, k, n_padded) / 2;
                        let pair = bytemuck::pod_collect_to_vec::<f16, u32>(&want[row * n_padded + k..][..2]);
                        assert_eq!(rows[at], pair[0], "position {position}, column {k}, {experts:?}");
                        written[at] = true;
                    }
                }
                (0..rows.len()).filter(|i| !written[*i]).for_each(|i| assert_untouched("rows by expert", &rows, i));
                (n..scales.len()).for_each(|i| assert_untouched("scales by expert", &scales, i));
            }
            Ok(())
        }),
        Trial::test("half_rows::reads_columns_of_wider_rows", || {
            let (n_rows, n_in, x_stride, x_offset) = (4, 37, 50, 9);
            let x = Random::new(6).values(n_rows * x_stride);
            let narrow: Vec<f32> = x.chunks_exact(x_stride).flat_map(|row| &row[x_offset..][..n_in]).copied().collect();
            let params = Params {
                x_stride: x_stride as u32,
                x_offset: x_offset as u32,
                ..Params::dense(n_rows as u32, n_in as u32)
            };
            same("columns", &halved(&x, params), &half_rows(&narrow, n_in, padded(n_in as u32) as usize));
            Ok(())
        }),
    ]
}
