//! Pages cover every byte once, slots are rewritten late, and the shapes of real models page well.

use std::collections::{BTreeMap, BTreeSet};

use fulmen::memory::pages::{PagePlan, PageShape, PageTable, Piece};
use fulmen::model::{ExpertMatrix, Shape, presets};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

fn shapes() -> impl Strategy<Value = PageShape> {
    let pages = prop_oneof![0u64..64, 64u64..5000];
    // Gate, up and down alike; or gate's slot holds up as well.
    let matrices = prop_oneof![
        (1u64..1000).prop_map(|bytes| [bytes; 3]),
        (1u64..1000, 1u64..1000).prop_map(|(gate_up, down)| [gate_up, 0, down]),
    ];
    (1usize..20, 0usize..=20, 1usize..50, matrices, pages, 1usize..5, 0usize..5).prop_map(
        |(experts, resident, ring, matrix_bytes, page_bytes, layers, extra)| {
            let resident = resident.min(experts);
            let extra = if resident == experts { 0 } else { extra.min(layers) };
            PageShape { experts, resident, extra, ring, matrix_bytes, page_bytes, layers }
        },
    )
}

/// Streamed experts in the order in which they are used, over `passes` passes.
fn uses(shape: PageShape, passes: usize) -> impl Iterator<Item = (usize, usize)> {
    let layers = (0..passes).flat_map(move |_| 0..shape.layers);
    layers.flat_map(move |layer| (shape.resident..shape.experts).map(move |expert| (layer, expert)))
}

proptest! {
    #[test]
    fn pages_cover_every_byte_of_every_streamed_matrix_once(shape in shapes()) {
        let plan = PagePlan::new(shape);
        let mut covered: BTreeMap<(usize, ExpertMatrix), u64> = BTreeMap::new();
        let mut next_expert = 0;
        for chunk in plan.chunks() {
            prop_assert_eq!(chunk.experts.start, next_expert, "chunks follow each other");
            prop_assert!(!chunk.experts.is_empty());
            next_expert = chunk.experts.end;
            prop_assert_eq!(chunk.pages.is_empty(), chunk.experts.end <= shape.resident);
            for page in &chunk.pages {
                prop_assert!(!page.pieces.is_empty());
                prop_assert!(page.bytes() <= shape.page_bytes.max(4), "{} bytes", page.bytes());
                for piece in &page.pieces {
                    prop_assert!(chunk.experts.contains(&piece.expert));
                    // Copies start at whole words, and each goes on where the last one ended.
                    prop_assert_eq!(piece.bytes.start % 4, 0);
                    let so_far = covered.entry((piece.expert, piece.matrix)).or_default();
                    prop_assert_eq!(piece.bytes.start, *so_far);
                    prop_assert!(piece.bytes.end > piece.bytes.start);
                    *so_far = piece.bytes.end;
                }
            }
        }
        prop_assert_eq!(next_expert, shape.experts);
        // As few chunks as half the ring allows, none of them with a remainder of a few experts.
        let sizes = plan.chunks().iter().filter(|chunk| !chunk.pages.is_empty()).map(|chunk| chunk.experts.len());
        let sizes: Vec<usize> = sizes.collect();
        let most = (shape.ring / 2).max(1);
        prop_assert!(sizes.iter().all(|size| *size <= most), "{:?} through half a ring of {}", sizes, shape.ring);
        prop_assert!(sizes.len() <= plan.streamed().div_ceil(most), "{:?}", sizes);
        if let Some(last) = sizes.last() {
            prop_assert!(sizes[0] - last < sizes.len(), "{:?}", sizes);
        }
        let streamed = (shape.resident..shape.experts).flat_map(|expert| ExpertMatrix::ALL.map(|matrix| (expert, matrix)));
        let wanted: BTreeMap<_, _> =
            streamed.map(|key| (key, shape.matrix_bytes[key.1 as usize])).filter(|(_, bytes)| *bytes > 0).collect();
        prop_assert_eq!(&covered, &wanted);
        let streamed = (shape.layers * (shape.experts - shape.resident) - shape.extra) as u64;
        prop_assert_eq!(plan.bytes_per_pass(), streamed * shape.matrix_bytes.iter().sum::<u64>());
        // What each layer loads is what does not stay there.
        for layer in 0..shape.layers {
            let pages = plan.chunks().iter().flat_map(|chunk| &chunk.pages).enumerate();
            let loaded = pages.filter(|(number, _)| plan.loads(layer, *number)).flat_map(|(_, page)| &page.pieces);
            let loaded: BTreeSet<_> = loaded.map(|piece| piece.expert).collect();
            let wanted: BTreeSet<_> = (0..shape.experts).filter(|expert| !plan.stays(layer, *expert)).collect();
            prop_assert_eq!(loaded, wanted);
        }
    }

    #[test]
    fn residents_own_their_slots_and_the_ring_goes_by_before_a_slot_is_used_again(shape in shapes()) {
        let plan = PagePlan::new(shape);
        let residents = (0..shape.layers).flat_map(|layer| (0..shape.experts).map(move |expert| (layer, expert)));
        let residents = residents.filter(|(layer, expert)| plan.stays(*layer, *expert));
        let slots: BTreeSet<usize> = residents.map(|(layer, expert)| plan.slot(0, layer, expert)).collect();
        let n_resident = shape.layers * shape.resident + shape.extra;
        prop_assert_eq!(slots, (0..n_resident).collect::<BTreeSet<_>>());
        let streams = shape.resident < shape.experts;
        prop_assert_eq!(plan.n_slots(), n_resident + if streams { shape.ring } else { 0 });

        // The ring is used slot by slot, across passes too: what is loaded ahead is a layer behind the last one.
        let mut start = 0;
        let mut index = 0;
        for _pass in 0..3 {
            for (layer, expert) in uses(shape, 1) {
                if !plan.stays(layer, expert) {
                    prop_assert_eq!(plan.slot(start, layer, expert), n_resident + index % shape.ring);
                }
                index += 1; // an extra resident's place in the ring stays empty
            }
            for expert in shape.resident..shape.experts {
                let ahead = plan.slot(start, shape.layers, expert); // a resident's, where it is one
                prop_assert_eq!(ahead, plan.slot(plan.next_ring_start(start), 0, expert));
            }
            start = plan.next_ring_start(start);
        }
        for chunk in plan.chunks() {
            let slots: BTreeSet<usize> = chunk.experts.clone().map(|expert| plan.slot(0, 0, expert)).collect();
            prop_assert_eq!(slots.len(), chunk.experts.len(), "two experts of a chunk share a slot");
            // Half of the ring computes while the other half loads.
            prop_assert!(chunk.pages.is_empty() || chunk.experts.len() <= (shape.ring / 2).max(1));
        }
    }

    /// What was loaded in order is there when its chunk computes, in every pass; what has been overwritten is known to be gone.
    #[test]
    fn a_chunk_is_there_once_its_pages_have_come(shape in shapes()) {
        let plan = PagePlan::new(shape);
        let mut table = PageTable::new(&plan);
        for (layer, chunk) in (0..2).flat_map(|_| 0..shape.layers).flat_map(|layer| plan.chunks().iter().map(move |c| (layer, c))) {
            let n_pieces: usize = chunk.pages.iter().map(|page| page.pieces.len()).sum();
            for piece in chunk.pages.iter().flat_map(|page| &page.pieces) {
                let slot = plan.slot(0, layer, piece.expert);
                table.arrive(slot, layer, piece, None);
                let last = piece.matrix == ExpertMatrix::Down && piece.bytes.end == shape.matrix_bytes[2];
                prop_assert_eq!(table.holds(slot, layer, piece.expert).is_some(), last);
            }
            for expert in chunk.experts.clone().filter(|_| n_pieces > 0) {
                let slot = plan.slot(0, layer, expert);
                prop_assert!(table.holds(slot, layer, expert).is_some());
                prop_assert!(table.holds(slot, layer + 1, expert).is_none());
                prop_assert!(table.holds(slot, layer, expert + 1).is_none());
            }
        }
    }
}

#[test]
fn an_expert_of_which_a_broken_off_pass_left_a_part_is_whole_after_it_comes_again() {
    let shape =
        PageShape { experts: 2, resident: 0, extra: 0, ring: 2, matrix_bytes: [100; 3], page_bytes: 60, layers: 1 };
    let plan = PagePlan::new(shape);
    let mut table = PageTable::new(&plan);
    let pieces: Vec<&Piece> = plan.chunks()[0].pages.iter().flat_map(|page| &page.pieces).collect();
    assert_eq!(pieces.len(), 7, "{pieces:?}");
    for broken_off in 0..pieces.len() {
        pieces[..broken_off].iter().for_each(|piece| table.arrive(0, 0, piece, None));
        assert!(table.holds(0, 0, 0).is_none(), "after {broken_off} pieces");
        pieces.iter().for_each(|piece| table.arrive(0, 0, piece, None));
        assert!(table.holds(0, 0, 0).is_some(), "after {broken_off} pieces and all of them");
    }
}

/// The six published shapes; a ring of two layers, pages of 32 MiB. gpt-oss is in MXFP4.
#[test]
fn six_models_page_well() {
    // Bytes of all expert weights, and pages of a layer.
    let expected = [
        ("mixtral-8x7b", 90_194_313_216, 84),
        ("mixtral-8x22b", 270_582_939_648, 144),
        ("dbrx", 253_671_505_920, 189),
        ("qwen3-30b-a3b", 57_982_058_496, 36),
        ("olmoe-1b-7b", 12_884_901_888, 24),
        ("gpt-oss-20b", 10_152_345_600, 13),
    ];
    for (name, expert_bytes, pages_per_layer) in expected {
        let config = presets::preset(name).unwrap();
        let Shape { layers, experts, .. } = config.shape;
        let matrix_bytes = config.forward.experts.slot_bytes(&config.shape, 2);
        let (ring, page_bytes) = (2 * experts, 32 * MIB);
        let plan = PagePlan::new(PageShape { experts, resident: 0, extra: 0, ring, matrix_bytes, page_bytes, layers });
        assert_eq!(plan.bytes_per_pass(), expert_bytes, "{name}");
        assert_eq!(plan.chunks().len(), 1, "{name}: a layer computes as one chunk");
        let pages = &plan.chunks()[0].pages;
        assert_eq!(pages.len(), pages_per_layer, "{name}");
        let (last, full) = pages.split_last().unwrap();
        assert!(full.iter().all(|page| page.bytes() == page_bytes), "{name}: every page but the last is full");
        assert!(last.bytes() > 0);
        let experts_of = |page: &fulmen::memory::pages::Page| {
            page.pieces.iter().map(|piece| piece.expert).collect::<BTreeSet<_>>().len()
        };
        let most = pages.iter().map(experts_of).max().unwrap();
        if matrix_bytes.iter().sum::<u64>() > page_bytes {
            assert!(most <= 2, "{name}: an expert takes several pages");
            assert!(pages.len() >= 3 * experts / 2, "{name}");
        } else {
            assert!(most >= 3, "{name}: experts share pages, {most} at most");
        }
        // A resident expert of eight streams no more.
        let resident = experts / 8;
        let shape = PageShape { experts, resident, extra: 0, ring, matrix_bytes, page_bytes, layers };
        assert_eq!(PagePlan::new(shape).bytes_per_pass(), expert_bytes / 8 * 7, "{name}");
    }
}
