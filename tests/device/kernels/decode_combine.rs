use fulmen::kernels::decode_attention::{Scratch, Whole};
use fulmen::kernels::decode_combine::{Params, record};
use fulmen::reference::decode_combine::{PartOfHead, decode_combine};
use libtest_mimic::Trial;

use crate::common::{Random, assert_close, assert_untouched, bits, download, poisoned, run, upload};

/// Rows of 1, 2, 3, ... parts, from the second of the list on.
struct Case {
    q_heads: usize,
    head_width: usize,
    wholes: Vec<Whole>,
    states: Vec<[f32; 2]>,
    sums: Vec<f32>,
    sinks: Option<Vec<f32>>,
}

impl Case {
    fn new(random: &mut Random, q_heads: usize, head_width: usize, n_rows: usize, with_sinks: bool) -> Self {
        let mut first_part = 0;
        let mut wholes = vec![Whole { row: u32::MAX, first_part: u32::MAX, n_parts: u32::MAX, unused: 0 }];
        for row in 0..n_rows as u32 {
            // Rows of out in another order.
            wholes.push(Whole { row: n_rows as u32 - 1 - row, first_part, n_parts: row + 1, unused: 0 });
            first_part += row + 1;
        }
        let n = first_part as usize * q_heads;
        let states = (0..n).map(|_| [20.0 * random.unit(), 1.0 + 100.0 * random.unit().abs()]).collect();
        let sums = random.values(n * head_width);
        let sinks = with_sinks.then(|| (0..q_heads).map(|_| 20.0 * random.unit()).collect());
        Self { q_heads, head_width, wholes, states, sums, sinks }
    }

    /// `[T, H, K]` with the rows of entries `entries` of the list written.
    fn combine(&self, entries: std::ops::Range<usize>) -> Vec<u32> {
        let (states, sums, wholes) = (upload(&self.states), upload(&self.sums), upload(&self.wholes));
        let sinks = upload(self.sinks.as_deref().unwrap_or(&[f32::NAN]));
        let n_out = (self.wholes.len() - 1) * self.q_heads * self.head_width;
        let out = poisoned(n_out + 70);
        let params = Params {
            n_rows: entries.len() as u32,
            first_row: entries.start as u32,
            q_heads: self.q_heads as u32,
            head_width: self.head_width as u32,
            has_sinks: self.sinks.is_some() as u32,
        };
        let scratch = Scratch { states: states.whole(), sums: sums.whole() };
        run(|r| record(r, params, wholes.whole(), scratch, sinks.whole(), out.whole()));
        let mut words: Vec<u32> = download(out.whole());
        (n_out..words.len()).for_each(|i| assert_untouched("decode_combine", &words, i));
        words.truncate(n_out);
        words
    }

    fn reference(&self) -> Vec<f32> {
        let mut out = vec![f32::NAN; (self.wholes.len() - 1) * self.q_heads * self.head_width];
        for whole in &self.wholes[1..] {
            for head in 0..self.q_heads {
                let parts: Vec<_> = (whole.first_part..whole.first_part + whole.n_parts)
                    .map(|part| part as usize * self.q_heads + head)
                    .map(|at| PartOfHead {
                        greatest: self.states[at][0],
                        total: self.states[at][1],
                        sums: &self.sums[at * self.head_width..][..self.head_width],
                    })
                    .collect();
                let sink = self.sinks.as_ref().map(|sinks| sinks[head]);
                let at = (whole.row as usize * self.q_heads + head) * self.head_width;
                out[at..at + self.head_width].copy_from_slice(&decode_combine(&parts, sink));
            }
        }
        out
    }
}

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("decode_combine::matches_reference_alone_and_among_others", || {
        for (q_heads, head_width, n_rows) in [(1, 1, 1), (3, 64, 5), (5, 65, 7), (2, 127, 3), (4, 128, 9)] {
            for with_sinks in [false, true] {
                let mut random = Random::new((100 * q_heads + head_width) as u64);
                let case = Case::new(&mut random, q_heads, head_width, n_rows, with_sinks);
                let what = format!("decode_combine H {q_heads} K {head_width}, {n_rows} rows, sinks: {with_sinks}");
                let together = case.combine(1..n_rows + 1);
                let got: Vec<f32> = together.iter().map(|word| f32::from_bits(*word)).collect();
                // Weighted means of at most 9 values below 1 in size: exp is good to some 20 * 2^-24 at arguments down to -40.
                assert_close(&what, &got, &case.reference(), |_| 100.0 * 2f32.powi(-24));
                let width = q_heads * head_width;
                for (entry, whole) in case.wholes.iter().enumerate().skip(1) {
                    let alone = case.combine(entry..entry + 1);
                    for i in 0..alone.len() {
                        if i / width == whole.row as usize {
                            assert_eq!(alone[i], together[i], "{what}: row {} alone", whole.row);
                        } else {
                            assert_untouched(&what, &alone, i);
                        }
                    }
                }
            }
        }
        // One part and no sink: the part itself, divided.
        let case = Case::new(&mut Random::new(9), 2, 8, 1, false);
        let want: Vec<f32> = case.sums.iter().zip(0..).map(|(sum, i)| sum / case.states[i / 8][1]).collect();
        assert_eq!(case.combine(1..2), bits(&want));
        Ok(())
    })]
}
