//! Assignments and expert matrices in slabs, for the tests of the kernels over experts.

use fulmen::checkpoint::Dtype;
use fulmen::gpu::{Buffer, Slice, Variant};
use fulmen::kernels::cooperative::Tile;
use fulmen::kernels::half_rows::{self, ByExpert, HalfRows, groups, padded};
use fulmen::kernels::slabs::{N_SLABS, Place};
use fulmen::reference::expert_sort::expert_sort;
use fulmen::reference::matmul::matmul;

use crate::common::{Random, poisoned, run, upload, weight_bytes};

/// A way to run a kernel over experts, for weights of one dtype.
#[derive(Debug, Clone)]
pub enum Form {
    Portable(Variant),
    /// On cooperative matrices.
    Cooperative {
        weights: Dtype,
        tile: Tile,
        aligned_slots: bool,
    },
}

impl Form {
    /// Bytes that places are to be multiples of.
    pub fn alignment(&self) -> usize {
        match self {
            Form::Cooperative { aligned_slots: true, .. } => 16,
            _ => 4,
        }
    }
}

/// What sums of products of x and each row of w may be off by; both as rows of so many terms.
pub type ProductError = fn(&[f32], &[f32], usize) -> Vec<f32>;

/// Where products and sums are f32: each of n terms is rounded at most n times, `n * 2^-24 * sum |x w|` in all.
pub fn f32_error(x: &[f32], w: &[f32], n_terms: usize) -> Vec<f32> {
    let magnitudes = |values: &[f32]| values.iter().map(|v| v.abs()).collect::<Vec<_>>();
    let sizes = matmul(&magnitudes(x), &magnitudes(w), n_terms);
    sizes.iter().map(|size| n_terms as f32 * 2f32.powi(-24) * size).collect()
}

/// The buffers that rows of f16 take.
pub struct Halves {
    rows: Buffer,
    scales: Buffer,
}

impl Halves {
    /// Of rows `x`.
    pub fn of(x: &Buffer, n_rows: usize, n_in: usize) -> Self {
        let halves = Self { rows: poisoned(n_rows * padded(n_in as u32) as usize / 2), scales: poisoned(n_rows) };
        let params = half_rows::Params::dense(n_rows as u32, n_in as u32);
        run(|recorder| half_rows::record(recorder, params, x.whole(), halves.rows()));
        halves
    }

    /// Of the rows that sorted positions have, as fragments: of rows `x`, or of one for each position where `by_position`.
    pub fn by_expert(x: &Buffer, by_position: bool, routing: &Routing, n_in: usize) -> Self {
        let (n_rows, n_experts) = (routing.n_assignments(), routing.offsets.len() as u32 - 1);
        let in_groups = 16 * groups(n_rows as u32, n_experts) as usize;
        let halves = Self { rows: poisoned(in_groups * padded(n_in as u32) as usize / 2), scales: poisoned(n_rows) };
        let (offsets, permutation) = (upload(&routing.offsets), upload(&routing.permutation));
        let order = ByExpert {
            n_experts,
            experts: [0, n_experts],
            offsets: offsets.whole(),
            permutation: (!by_position).then(|| (permutation.whole(), routing.n_chosen as u32)),
        };
        let params = half_rows::Params::dense(n_rows as u32, n_in as u32);
        run(|recorder| half_rows::record_by_expert(recorder, params, order, x.whole(), halves.rows()));
        halves
    }

    pub fn rows(&self) -> HalfRows<'_> {
        HalfRows { rows: self.rows.whole(), scales: self.scales.whole() }
    }
}

/// Who goes where, sorted.
pub struct Routing {
    pub n_chosen: usize,
    /// `[T * A]`, distinct within a row.
    pub ids: Vec<u32>,
    pub offsets: Vec<u32>,
    pub permutation: Vec<u32>,
}

impl Routing {
    pub fn new(ids: Vec<u32>, n_chosen: usize, n_experts: usize) -> Self {
        let (offsets, permutation) = expert_sort(&ids, n_experts);
        Self { n_chosen, ids, offsets, permutation }
    }

    /// Every row picks expert 0 where A > 1; nobody picks the last expert where there is another choice.
    pub fn random(random: &mut Random, n_rows: usize, n_chosen: usize, n_experts: usize) -> Self {
        let popular = if n_experts > n_chosen { n_experts - 1 } else { n_experts };
        let mut ids = Vec::new();
        for _ in 0..n_rows {
            let mut row: Vec<u32> = if n_chosen > 1 { vec![0] } else { vec![] };
            while row.len() < n_chosen {
                let id = random.below(popular) as u32;
                if !row.contains(&id) {
                    row.push(id);
                }
            }
            ids.extend(row);
        }
        Self::new(ids, n_chosen, n_experts)
    }

    /// The same choices for one row alone.
    pub fn of_row(&self, row: usize) -> Self {
        let ids = self.ids[row * self.n_chosen..][..self.n_chosen].to_vec();
        Self::new(ids, self.n_chosen, self.offsets.len() - 1)
    }

    pub fn n_assignments(&self) -> usize {
        self.ids.len()
    }

    /// The expert of a sorted position.
    pub fn expert_of(&self, position: usize) -> usize {
        self.ids[self.permutation[position] as usize] as usize
    }
}

/// One matrix per expert, spread over the slabs with gaps of NaN before, between and after them.
pub struct Matrices {
    /// Widened again from what the slabs hold.
    pub values: Vec<Vec<f32>>,
    slabs: Vec<Buffer>,
}

impl Matrices {
    pub fn slabs(&self) -> [Slice<'_>; N_SLABS] {
        std::array::from_fn(|slab| self.slabs[slab].whole())
    }
}

/// `kinds` matrices of `elements` per expert, and the table of places that all kinds share, of multiples of 4 bytes.
pub fn matrices(
    random: &mut Random,
    dtype: Dtype,
    n_experts: usize,
    elements: usize,
    kinds: usize,
    absent: &[usize],
) -> (Vec<Matrices>, Vec<Place>) {
    matrices_at(4, random, dtype, n_experts, elements, kinds, absent)
}

/// The same at multiples of `alignment` bytes.
pub fn matrices_at(
    alignment: usize,
    random: &mut Random,
    dtype: Dtype,
    n_experts: usize,
    elements: usize,
    kinds: usize,
    absent: &[usize],
) -> (Vec<Matrices>, Vec<Place>) {
    // All bits set: a NaN in every dtype.
    const GAP: [u8; 4] = [0xff; 4];
    let mut slabs = vec![vec![Vec::<u8>::new(); N_SLABS]; kinds];
    let mut values = vec![Vec::new(); kinds];
    let mut places = Vec::new();
    for _ in 0..n_experts {
        let slab = random.below(N_SLABS);
        let gap = 1 + random.below(5);
        slabs.iter_mut().for_each(|slabs| slabs[slab].extend(GAP.repeat(gap * alignment / 4)));
        let offset_words = slabs[0][slab].len() as u32 / 4;
        places.push(Place { slab: slab as u32, offset_words });
        for (slabs, values) in slabs.iter_mut().zip(&mut values) {
            let bytes = weight_bytes(dtype, &random.values(elements));
            values.push(dtype.read_all(&bytes));
            slabs[slab].extend(&bytes);
            let padding = bytes.len().next_multiple_of(alignment) - bytes.len();
            slabs[slab].extend(std::iter::repeat_n(GAP[0], padding));
        }
    }
    for expert in absent {
        places[*expert] = Place::ABSENT;
    }
    let matrices = slabs.into_iter().zip(values).map(|(slabs, values)| {
        let slabs = slabs.into_iter().map(|bytes| upload(&[bytes, GAP.repeat(4)].concat())).collect();
        Matrices { values, slabs }
    });
    (matrices.collect(), places)
}

/// T, A, E, D, F.
pub type Extents = (usize, usize, usize, usize, usize);

/// None, one, primes, around the tiles of 16, 32 and 64 rows and of 32, 64 and 128 columns, odd widths,
/// one expert for all, as many chosen as there are.
pub const SHAPES: [Extents; 12] = [
    (0, 1, 1, 8, 8),
    (1, 1, 1, 1, 1),
    (1, 2, 3, 16, 64),
    (3, 4, 4, 15, 31),
    (7, 2, 8, 17, 65),
    (31, 1, 2, 32, 32),
    (32, 1, 1, 33, 63),
    (33, 1, 1, 31, 127),
    (64, 2, 4, 48, 33),
    (65, 3, 5, 67, 129),
    (13, 4, 16, 53, 67),
    (129, 1, 3, 128, 16),
];
