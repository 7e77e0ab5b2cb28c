//! Who owns which blocks, and whether their bytes survive.

use fulmen::memory::kv_cache::{
    BLOCK_TOKENS, BlockTable, KvCache, KvError, KvLayout, OutOfBlocks, RestoreCause, RowPlace, SpillFile, SpilledTable,
};
use fulmen::policy::KvDtype;
use fulmen::reference::kv_quantise::{dequantised, quantise};
use half::f16;

use crate::common::{Random, threads};

const LAYOUT: KvLayout = KvLayout { layers: 3, kv_heads: 2, head_width: 6, dtype: KvDtype::F16 };
const INT8: KvLayout = KvLayout { dtype: KvDtype::Int8, ..LAYOUT };

fn cache(n_blocks: usize) -> KvCache {
    KvCache::new(LAYOUT, n_blocks).unwrap()
}

/// A table with room for `tokens` tokens.
fn table(cache: &mut KvCache, tokens: usize) -> BlockTable {
    let mut table = BlockTable::new();
    cache.reserve(&mut table, tokens).unwrap();
    table
}

/// A row that tells who wrote it and where. Any bits will do, NaN among them: the cache only stores them.
fn coded_row(sequence: usize, layer: usize, position: usize) -> Vec<f16> {
    let n = LAYOUT.row_elements();
    (0..n).map(|i| f16::from_bits((sequence * 9973 + (layer * 1009 + position) * n + i) as u16)).collect()
}

fn write_coded(cache: &mut KvCache, sequence: usize, table: &BlockTable, position: usize) {
    for layer in 0..LAYOUT.layers {
        cache.write_row(layer, table, position, &coded_row(sequence, layer, position));
    }
}

/// What the cache makes of a row: bits, of which one stands for all that are no number.
fn stored(layout: KvLayout, row: &[f16]) -> Vec<u16> {
    let row: Vec<f16> = match layout.dtype {
        KvDtype::F16 => row.to_vec(),
        KvDtype::Int8 => row
            .chunks_exact(layout.head_width)
            .flat_map(|half| {
                let (integers, scale) = quantise(half);
                integers.into_iter().map(move |integer| dequantised(integer, scale))
            })
            .collect(),
    };
    bits(&row)
}

fn bits(row: &[f16]) -> Vec<u16> {
    row.iter().map(|x| if x.is_nan() { f16::NAN.to_bits() } else { x.to_bits() }).collect()
}

fn assert_coded(cache: &KvCache, sequence: usize, table: &BlockTable, positions: std::ops::Range<usize>) {
    for position in positions {
        for layer in 0..LAYOUT.layers {
            let expected = stored(cache.layout(), &coded_row(sequence, layer, position));
            let found = bits(&cache.row(layer, table, position));
            assert_eq!(found, expected, "sequence {sequence}, layer {layer}, position {position}");
        }
    }
}

#[test]
fn sizes_follow_from_the_layout() {
    // Mixtral 8x7B: 128 KiB per token, as its published shape has it.
    let mixtral = KvLayout { layers: 32, kv_heads: 8, head_width: 128, dtype: KvDtype::F16 };
    assert_eq!(mixtral.bytes_per_token(), 128 << 10);
    assert_eq!(mixtral.bytes_per_block(), 4 << 20);
    assert_eq!(mixtral.block_bytes(), 8 * 2 * BLOCK_TOKENS * 128 * 2);
    assert_eq!(mixtral.keys(3), 3 * 2 * BLOCK_TOKENS * 256..(3 * 2 + 1) * BLOCK_TOKENS * 256);
    assert_eq!(mixtral.new_row_bytes(), 8 * 2 * 256);

    // A byte an element and two for a scale; on the way from the device the scale takes a word.
    let mixtral = KvLayout { dtype: KvDtype::Int8, ..mixtral };
    assert_eq!(mixtral.bytes_per_token(), 32 * 8 * 2 * (128 + 2));
    assert_eq!(mixtral.keys(1), 2 * BLOCK_TOKENS * 128..3 * BLOCK_TOKENS * 128);
    let scales = 16 * BLOCK_TOKENS * 128 + 14 * BLOCK_TOKENS * 2;
    assert_eq!(mixtral.key_scales(7), scales..scales + 2 * BLOCK_TOKENS);
    assert_eq!(mixtral.block_bytes(), scales + 2 * 2 * BLOCK_TOKENS);
    assert_eq!(mixtral.new_row_bytes(), 8 * 2 * (128 + 4));
    assert_eq!(INT8.new_row_bytes(), 2 * 2 * (8 + 4));
    // Whole fours.
    assert_eq!(INT8.block_bytes(), 2 * 2 * BLOCK_TOKENS * (8 + 2));
}

#[test]
fn blocks_are_taken_as_tokens_arrive_and_come_back() {
    let mut cache = cache(4);
    let mut table = BlockTable::new();
    for (tokens, used) in [(0, 0), (1, 1), (BLOCK_TOKENS, 1), (BLOCK_TOKENS + 1, 2), (3 * BLOCK_TOKENS, 3), (5, 3)] {
        cache.reserve(&mut table, tokens).unwrap();
        assert_eq!((table.blocks().len(), cache.free_blocks()), (used, 4 - used), "{tokens} tokens");
    }
    assert_eq!(table.capacity_tokens(), 3 * BLOCK_TOKENS);
    cache.release(table);
    assert_eq!((cache.free_blocks(), cache.total_blocks()), (4, 4));
}

#[test]
fn running_out_of_blocks_takes_nothing() {
    let mut cache = cache(4);
    let other = table(&mut cache, 2 * BLOCK_TOKENS);
    let mut table = table(&mut cache, 1);
    let before = table.blocks().to_vec();
    let out_of_blocks = cache.reserve(&mut table, 3 * BLOCK_TOKENS).unwrap_err();
    assert_eq!(out_of_blocks, OutOfBlocks { needed: 2, free: 1 });
    assert_eq!((table.blocks(), cache.free_blocks()), (&before[..], 1));
    assert_eq!(out_of_blocks.to_string(), "the KV cache is out of blocks: 2 more are needed, 1 are free");
    cache.release(other);
    cache.reserve(&mut table, 3 * BLOCK_TOKENS).unwrap();
}

#[test]
fn a_pool_that_the_system_refuses_is_an_error_with_numbers() {
    let layout = KvLayout { layers: 1 << 20, kv_heads: 1 << 10, head_width: 1 << 10, dtype: KvDtype::F16 };
    let error = KvCache::new(layout, 1 << 12).unwrap_err();
    assert!(matches!(error, KvError::Refused { .. }), "{error}");
    assert!(error.to_string().contains("536870912.00 GiB"), "{error}");
    let error = KvCache::new(layout, 1 << 31).unwrap_err();
    assert!(matches!(error, KvError::TooLarge { .. }), "{error}");
}

#[test]
fn rows_lie_by_head_keys_before_values() {
    let mut cache = cache(2);
    let table = table(&mut cache, BLOCK_TOKENS + 1);
    let row: Vec<f16> = (0..LAYOUT.row_elements()).map(|i| f16::from_f32(i as f32)).collect();
    cache.write_row(2, &table, BLOCK_TOKENS, &row);
    let block = cache.block(2, table.blocks()[1]);
    for head in 0..LAYOUT.kv_heads {
        let keys = LAYOUT.keys(head);
        let n = LAYOUT.head_width;
        let bytes = |row: &[f16]| bytemuck::cast_slice::<f16, u8>(row).to_vec();
        assert_eq!(block[keys.start..][..2 * n], bytes(&row[2 * head * n..][..n]), "K of head {head}");
        assert_eq!(block[keys.end..][..2 * n], bytes(&row[(2 * head + 1) * n..][..n]), "V of head {head}");
    }
}

/// Integers in fours, of columns in K, which are 128 more, and of slots in V, and scales by slot behind all of them; a neighbour's rows change none of it.
#[test]
fn rows_of_integers_lie_in_front_of_all_scales() {
    let mut cache = KvCache::new(INT8, 1).unwrap();
    let table = table(&mut cache, BLOCK_TOKENS);
    // The largest is 127 of the scale, which 127 · 2^-7 fits.
    let row: Vec<f16> =
        (0..INT8.row_elements()).map(|i| f16::from_f32([127.0, -127.0, 64.0, 1.0, 0.0, -2.0][i % 6] / 128.0)).collect();
    cache.write_row(1, &table, 18, &row.iter().map(|x| *x * f16::from_f32(8.0)).collect::<Vec<_>>());
    cache.write_row(1, &table, 19, &row);
    let block = cache.block(1, table.blocks()[0]);
    for head in 0..INT8.kv_heads {
        let (keys, scales) = (INT8.keys(head), INT8.key_scales(head));
        // 6 columns are two fours.
        assert_eq!((keys.len(), scales.len()), (BLOCK_TOKENS * 8, BLOCK_TOKENS * 2));
        for (integers, scales, values) in [
            (&block[keys.clone()], &block[scales.clone()], false),
            (&block[keys.end..][..keys.len()], &block[scales.end..][..scales.len()], true),
        ] {
            for (column, integer) in [127, -127i8, 64, 1, 0, -2].into_iter().enumerate() {
                // Slots 18 and 19: third and fourth of the second 16 keys, and of the fifth four of values.
                let line = if values { 0 } else { (2 + column / 4) * 64 };
                let at = if values { 4 * 8 * 4 + 4 * column + 2 } else { line + 2 * 4 + column % 4 };
                let (step, excess) = if values { (1, 0) } else { (4, 128) };
                let found = [at, at + step].map(|at| integers[at].wrapping_sub(excess) as i8);
                assert_eq!(found, [integer; 2], "{column}, values {values}");
            }
            assert_eq!(
                scales[2 * 18..2 * 20],
                [f16::from_f32(0.0625).to_le_bytes(), f16::from_f32(0.0078125).to_le_bytes()].concat()
            );
        }
    }
}

#[test]
fn many_rows_at_once_are_the_same_rows() {
    for layout in [LAYOUT, INT8] {
        many_rows_at_once(KvCache::new(layout, 12).unwrap());
    }
}

fn many_rows_at_once(mut cache: KvCache) {
    let layout = cache.layout();
    let mut random = Random::new(7);
    let tables: Vec<BlockTable> = [70, 1, 33, 100].map(|tokens| table(&mut cache, tokens)).into();
    let mut places: Vec<(usize, usize)> =
        tables.iter().enumerate().flat_map(|(i, table)| (0..table.capacity_tokens()).map(move |p| (i, p))).collect();
    for last in (1..places.len()).rev() {
        places.swap(last, random.below(last + 1));
    }
    let rows: Vec<RowPlace> = places.iter().map(|&(i, position)| RowPlace { table: &tables[i], position }).collect();
    for n_threads in [1, 3] {
        for layer in 0..LAYOUT.layers {
            let data: Vec<u8> = places
                .iter()
                .flat_map(|&(i, position)| layout.new_row(&coded_row(i + n_threads, layer, position)))
                .collect();
            cache.write_rows(layer, &rows, &data, &threads(n_threads));
        }
        for (i, table) in tables.iter().enumerate() {
            assert_coded(&cache, i + n_threads, table, 0..table.capacity_tokens());
        }
    }
    cache.write_rows(0, &[], &[], &threads(1));
}

#[test]
fn a_fork_shares_full_blocks_and_copies_the_partial_one() {
    let mut cache = cache(8);
    let tokens = 2 * BLOCK_TOKENS + 5;
    let mut parent = table(&mut cache, tokens);
    (0..tokens).for_each(|position| write_coded(&mut cache, 1, &parent, position));
    let mut child = cache.fork(&parent, tokens).unwrap();
    assert_eq!(cache.free_blocks(), 8 - 4);
    assert_eq!(child.blocks()[..2], parent.blocks()[..2]);
    assert_ne!(child.blocks()[2], parent.blocks()[2]);

    // Both go on, each its own way.
    for (sequence, table) in [(1, &mut parent), (2, &mut child)] {
        cache.reserve(table, 3 * BLOCK_TOKENS + 1).unwrap();
        (tokens..3 * BLOCK_TOKENS + 1).for_each(|position| write_coded(&mut cache, sequence, table, position));
    }
    assert_coded(&cache, 1, &parent, 0..3 * BLOCK_TOKENS + 1);
    assert_coded(&cache, 1, &child, 0..tokens);
    assert_coded(&cache, 2, &child, tokens..3 * BLOCK_TOKENS + 1);

    cache.release(parent);
    assert_eq!(cache.free_blocks(), 8 - 4, "the child still owns the shared blocks");
    assert_coded(&cache, 1, &child, 0..tokens);
    cache.release(child);
    assert_eq!(cache.free_blocks(), 8);
}

#[test]
fn a_fork_at_a_block_boundary_needs_no_block_and_one_without_room_takes_none() {
    let mut cache = cache(2);
    let parent = table(&mut cache, 2 * BLOCK_TOKENS);
    let child = cache.fork(&parent, 2 * BLOCK_TOKENS).unwrap();
    assert_eq!(child.blocks(), parent.blocks());
    assert_eq!(cache.fork(&parent, BLOCK_TOKENS + 1).unwrap_err(), OutOfBlocks { needed: 1, free: 0 });
    cache.release(parent);
    cache.release(child);
    assert_eq!(cache.free_blocks(), 2, "a fork that failed left an owner behind");
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "other owners")]
fn a_shared_block_is_not_written() {
    let mut cache = cache(2);
    let parent = table(&mut cache, BLOCK_TOKENS);
    let _child = cache.fork(&parent, BLOCK_TOKENS).unwrap();
    write_coded(&mut cache, 1, &parent, 3);
}

/// Random steps of many sequences against a plain model of them: what each wrote is what each finds, whatever was
/// spilled, restored, forked, released or reused meanwhile.
#[test]
fn sequences_keep_their_rows_whatever_happens_around_them() {
    enum Place {
        Cache(BlockTable),
        File(SpilledTable),
    }
    struct Sequence {
        place: Place,
        /// Who wrote each token: a fork inherits its parent's.
        writers: Vec<usize>,
    }
    let directory = tempfile::tempdir().unwrap();
    for seed in 0..20 {
        let layout = if seed % 2 == 0 { LAYOUT } else { INT8 };
        let mut random = Random::new(seed);
        let mut cache = KvCache::new(layout, 16).unwrap();
        let mut file = SpillFile::new(directory.path(), layout);
        let mut sequences: Vec<Sequence> = Vec::new();
        let mut next_writer = 0;
        let mut most_spilled = 0;
        for _ in 0..300 {
            let chosen = random.below(sequences.len().max(1));
            match (random.below(6), sequences.get_mut(chosen)) {
                (0, _) | (_, None) => {
                    sequences.push(Sequence { place: Place::Cache(BlockTable::new()), writers: Vec::new() });
                }
                (1 | 2, Some(Sequence { place: Place::Cache(table), writers })) => {
                    let tokens = writers.len() + 1 + random.below(40);
                    if cache.reserve(table, tokens).is_ok() {
                        next_writer += 1;
                        for position in writers.len()..tokens {
                            write_coded(&mut cache, next_writer, table, position);
                        }
                        writers.resize(tokens, next_writer);
                    }
                }
                (3, Some(Sequence { place: Place::Cache(table), writers })) => {
                    let tokens = random.below(writers.len() + 1);
                    if let Ok(fork) = cache.fork(table, tokens) {
                        let writers = writers[..tokens].to_vec();
                        sequences.push(Sequence { place: Place::Cache(fork), writers });
                    }
                }
                (4, Some(_)) => match sequences.swap_remove(chosen) {
                    Sequence { place: Place::Cache(table), writers } => {
                        let place = Place::File(cache.spill(table, &mut file).unwrap());
                        sequences.push(Sequence { place, writers });
                    }
                    Sequence { place: Place::File(spilled), writers } => {
                        let place = match cache.restore(spilled, &mut file) {
                            Ok(table) => Place::Cache(table),
                            Err(error) => Place::File(error.spilled),
                        };
                        sequences.push(Sequence { place, writers });
                    }
                },
                (_, Some(_)) if random.below(3) == 0 => match sequences.swap_remove(chosen).place {
                    Place::Cache(table) => cache.release(table),
                    Place::File(spilled) => file.discard(spilled),
                },
                _ => {}
            }
            let spilled = |s: &Sequence| if let Place::File(spilled) = &s.place { spilled.n_blocks() } else { 0 };
            most_spilled = most_spilled.max(sequences.iter().map(spilled).sum());
        }
        assert_eq!(file.size_bytes(), (most_spilled * layout.bytes_per_block()) as u64, "seed {seed}: space is reused");
        for Sequence { place, writers } in sequences {
            let table = match place {
                Place::Cache(table) => table,
                // The others are in the cache no more, so one after the other fits.
                Place::File(spilled) => match cache.restore(spilled, &mut file) {
                    Ok(table) => table,
                    Err(error) => {
                        file.discard(error.spilled);
                        continue;
                    }
                },
            };
            for (position, &writer) in writers.iter().enumerate() {
                assert_coded(&cache, writer, &table, position..position + 1);
            }
            cache.release(table);
        }
        assert_eq!(cache.free_blocks(), 16, "seed {seed}: blocks were lost");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "the spill file has no name");
}

#[test]
fn the_spill_file_is_made_late_and_its_space_reused() {
    let mut cache = cache(4);
    let mut file = SpillFile::new("/nonexistent", LAYOUT);
    assert_eq!(file.size_bytes(), 0);
    let empty = cache.spill(BlockTable::new(), &mut file).unwrap();
    assert_eq!(empty.n_blocks(), 0);

    let directory = tempfile::tempdir().unwrap();
    let mut file = SpillFile::new(directory.path(), LAYOUT);
    for round in 0..10 {
        let table = table(&mut cache, 3 * BLOCK_TOKENS);
        (0..BLOCK_TOKENS).for_each(|position| write_coded(&mut cache, round, &table, position));
        let spilled = cache.spill(table, &mut file).unwrap();
        assert_eq!((spilled.n_blocks(), cache.free_blocks()), (3, 4));
        let table = cache.restore(spilled, &mut file).unwrap();
        assert_coded(&cache, round, &table, 0..BLOCK_TOKENS);
        cache.release(table);
    }
    assert_eq!(file.size_bytes(), 3 * LAYOUT.bytes_per_block() as u64);
}

#[test]
fn a_spill_that_fails_gives_the_table_back_and_names_the_place() {
    let mut cache = cache(2);
    let table = table(&mut cache, BLOCK_TOKENS + 1);
    write_coded(&mut cache, 1, &table, 32);
    let mut file = SpillFile::new("/nonexistent/spill", LAYOUT);
    let error = cache.spill(table, &mut file).unwrap_err();
    assert_eq!(error.to_string(), "cannot spill a sequence of 2 blocks");
    assert_eq!(error.cause.to_string(), "the KV spill file in /nonexistent/spill: creating it");
    assert_eq!(cache.free_blocks(), 0);
    assert_coded(&cache, 1, &error.table, 32..33);
    cache.release(error.table);
}

#[test]
fn restoring_into_too_few_blocks_gives_the_spilled_table_back() {
    let directory = tempfile::tempdir().unwrap();
    let mut cache = cache(3);
    let mut file = SpillFile::new(directory.path(), LAYOUT);
    let preempted = table(&mut cache, 2 * BLOCK_TOKENS);
    (0..2 * BLOCK_TOKENS).for_each(|position| write_coded(&mut cache, 1, &preempted, position));
    let spilled = cache.spill(preempted, &mut file).unwrap();
    let other = table(&mut cache, 2 * BLOCK_TOKENS);
    let error = cache.restore(spilled, &mut file).unwrap_err();
    assert!(matches!(error.cause, RestoreCause::OutOfBlocks(OutOfBlocks { needed: 2, free: 1 })), "{error}");
    assert_eq!(cache.free_blocks(), 1);
    cache.release(other);
    let restored = cache.restore(error.spilled, &mut file).unwrap();
    assert_coded(&cache, 1, &restored, 0..2 * BLOCK_TOKENS);
}
