use fulmen::checkpoint::Dtype;
use fulmen::kernels::embed::{Params, record};
use fulmen::reference::embed::embed;
use libtest_mimic::Trial;

use crate::common::{DTYPES, Random, assert_untouched, bits, download, poisoned, run, upload, upload_weights};

/// Gathers on the device; the buffer for y is longer than the result, and what lies behind it must stay as it was.
fn gather(dtype: Dtype, ids: &[u32], table: &[f32], d_model: usize) -> (Vec<u32>, Vec<f32>) {
    let (table, widened) = upload_weights(dtype, table);
    let n = ids.len() * d_model;
    let (ids_gpu, y) = (upload(ids), poisoned(n + 70));
    let params = Params { n_rows: ids.len() as u32, d_model: d_model as u32 };
    run(|recorder| record(recorder, dtype, params, ids_gpu.whole(), table.whole(), y.whole()));
    let words: Vec<u32> = download(y.whole());
    (n..n + 70).for_each(|i| assert_untouched("embed", &words, i));
    (words[..n].to_vec(), embed(ids, &widened, d_model))
}

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("embed::copies_rows_exactly", || {
            for dtype in DTYPES {
                // An odd width puts every second row of a 16-bit table in the middle of a word.
                for (n_rows, vocab, d_model) in
                    [(0, 3, 8), (1, 1, 1), (7, 5, 63), (3, 11, 64), (64, 17, 65), (5, 2, 257)]
                {
                    let mut random = Random::new((n_rows * 1000 + d_model) as u64);
                    let table = random.values(vocab * d_model);
                    let ids: Vec<u32> = (0..n_rows).map(|_| random.below(vocab) as u32).collect();
                    let (got, want) = gather(dtype, &ids, &table, d_model);
                    assert_eq!(got, bits(&want), "{dtype:?} {n_rows} rows of {d_model}");
                }
            }
            Ok(())
        }),
        // The gather of the residual stream must not round, flush or quieten anything.
        Trial::test("embed::keeps_every_f32_pattern", || {
            let mut random = Random::new(3);
            let mut table: Vec<f32> = (0..512).map(|_| f32::from_bits(random.bits() as u32)).collect();
            table.extend([0.0, -0.0, f32::from_bits(1), -f32::MIN_POSITIVE / 2.0, f32::INFINITY, f32::NEG_INFINITY]);
            table.extend([f32::MAX, f32::from_bits(0xffc0_1234)]);
            let (got, want) = gather(Dtype::F32, &[64, 0, 33, 64], &table, 8);
            assert_eq!(got, bits(&want));
            Ok(())
        }),
    ]
}
