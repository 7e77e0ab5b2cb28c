use fulmen::kernels::add_bias::{Params, record};
use fulmen::reference::add_bias::add_bias;
use libtest_mimic::Trial;

use crate::common::{Random, bits, download, run, upload};

/// Columns outside keep their bits, and so does what lies behind the rows.
fn matches_reference(n_rows: usize, n_columns: usize, y_stride: usize, y_offset: usize) {
    let mut random = Random::new((n_rows * 1000 + n_columns) as u64);
    let (y, bias) = (random.values(n_rows * y_stride + 70), random.values(n_columns));
    let params = Params {
        n_rows: n_rows as u32,
        n_columns: n_columns as u32,
        y_stride: y_stride as u32,
        y_offset: y_offset as u32,
    };
    let (bias_gpu, y_gpu) = (upload(&bias), upload(&y));
    run(|recorder| record(recorder, params, bias_gpu.whole(), y_gpu.whole()));
    let got: Vec<f32> = download(y_gpu.whole());
    let (rows, behind) = y.split_at(n_rows * y_stride);
    // One addition, rounded once: the same bits.
    let want = [add_bias(rows, &bias, y_stride, y_offset), behind.to_vec()].concat();
    assert_eq!(bits(&got), bits(&want), "{n_rows} rows, {n_columns} columns from {y_offset} of {y_stride}");
}

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("add_bias::matches_reference", || {
        for n_rows in [0, 1, 3, 17] {
            for (n_columns, y_stride, y_offset) in [(1, 1, 0), (7, 9, 1), (63, 64, 0), (64, 64, 0), (65, 200, 131)] {
                matches_reference(n_rows, n_columns, y_stride, y_offset);
            }
        }
        Ok(())
    })]
}
