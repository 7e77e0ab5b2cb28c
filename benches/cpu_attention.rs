//! Decode attention on the CPU, in the heads of Mixtral 8x7B: does it run at the speed of memory?
//!
//! For both ways to keep K and V, every level and context: passes over a pool that is several times the last-level cache, in calls
//! of two rows a thread, turn by turn with plain reads of the same pool on the same threads; a row is compared with the
//! reference. At the end tokens/s of both ways, turn by turn. Threads: as many as read fastest. `FULMEN_THREADS=8` asks for another number,
//! `FULMEN_PASSES` for other medians.

use fulmen::cpu::isa::Isa;
use fulmen::cpu::measure::{AttentionRate, Probe, thread_counts};
use fulmen::model::AttentionShape;
use fulmen::policy::KvDtype;

const SHAPE: AttentionShape =
    AttentionShape { q_heads: 32, kv_heads: 8, head_width: 128, window: None, scale: 0.088_388_35 };
const CONTEXTS: [usize; 7] = [128, 256, 512, 1024, 2048, 8192, 32768];
/// Where int8 is held against f16, turn by turn: on the level of this machine, and on all.
const COMPARED: [usize; 6] = [256, 512, 1024, 2048, 8192, 32768];
const COMPARED_BY_ALL: [usize; 2] = [512, 2048];
/// The portable level is no match for memory; one context shows what it does.
const PORTABLE_CONTEXT: usize = 512;
/// Ends the names of levels that multiply integers better than others.
const VNNI: &str = "vnni";
const ROWS_PER_THREAD: usize = 2;
const IN_CACHE_CONTEXT: usize = 128;
/// K and V of made-up keys are 0.5 at most; see `tests/host/attention.rs` for the reasons.
const TOLERANCE: fn(KvDtype) -> f32 = |dtype| if dtype == KvDtype::F16 { 2e-6 } else { 4e-5 };

fn main() {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<usize>().ok());
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let passes = number("FULMEN_PASSES").unwrap_or(3);
    let mut n_threads = number("FULMEN_THREADS");
    for dtype in KvDtype::ALL {
        let all = pool(cores);
        let mut probe = Probe::new(SHAPE, dtype, ROWS_PER_THREAD * cores, CONTEXTS[CONTEXTS.len() - 1], &all)
            .expect("a quarter of the memory that is available");
        drop(all);
        println!("\n{dtype} keys and values, a pool of {:.2} GiB", probe.bytes() as f64 / (1u64 << 30) as f64);
        let reads: Vec<(usize, f64)> =
            thread_counts(cores).into_iter().map(|n| (n, probe.read_rate(&pool(n), passes))).collect();
        let by_threads: Vec<String> = reads.iter().map(|(n, rate)| format!("{n}: {:.1}", rate / 1e9)).collect();
        println!("plain read, GB/s by threads: {}", by_threads.join(", "));
        let best = reads.iter().max_by(|a, b| a.1.total_cmp(&b.1)).expect("at least one thread").0;
        // The same for both dtypes, which are compared.
        let n_threads = *n_threads.get_or_insert(best);

        // Little work on many threads: what a call costs whatever its rows.
        let small =
            probe.attention(Isa::best(), 1, ROWS_PER_THREAD * n_threads, 1, &pool(n_threads)).expect("a token fits");
        let call_s = small.rows as f64 / small.tokens_per_s;
        println!("a call of {} rows of one token: {:.0} us", small.rows, 1e6 * call_s);
        println!("level       threads  context   rows     GB/s   % of a plain read   million tokens/s");
        let mut show = |isa: Isa, context: usize, n_threads: usize, rows: usize| {
            let Some(rate) = probe.attention(isa, context, rows, passes, &pool(n_threads)) else { return };
            println!(
                "{:10}  {n_threads:7}  {context:7}  {:5}  {:7.2}  {:6.0}  (of {:.1})  {:12.2}",
                isa.name(),
                rate.rows,
                rate.bytes_per_s / 1e9,
                100.0 * rate.share_of_read,
                rate.read_bytes_per_s / 1e9,
                rate.tokens_per_s / 1e6
            );
            check(&rate, dtype, isa);
        };
        for isa in Isa::available() {
            // Over f16 they run the same code as those without.
            if dtype == KvDtype::F16 && isa.name().ends_with(VNNI) {
                continue;
            }
            if isa.name() == "portable" {
                show(isa, PORTABLE_CONTEXT, n_threads, ROWS_PER_THREAD * n_threads);
                continue;
            }
            for context in CONTEXTS {
                show(isa, context, n_threads, ROWS_PER_THREAD * n_threads);
            }
            // One sequence alone, whose spans all threads share; and a large batch.
            show(isa, CONTEXTS[CONTEXTS.len() - 1], n_threads, 1);
            show(isa, PORTABLE_CONTEXT, n_threads, 16 * n_threads);
        }
        for n_threads in thread_counts(cores) {
            show(Isa::best(), PORTABLE_CONTEXT, n_threads, ROWS_PER_THREAD * n_threads);
        }
    }
    // What cores could do if memory were no limit.
    println!("\n{IN_CACHE_CONTEXT} tokens in each thread's cache, GB/s by threads");
    for dtype in KvDtype::ALL {
        for isa in Isa::available() {
            let bytes = IN_CACHE_CONTEXT * 2 * SHAPE.kv_heads * SHAPE.head_width * 2;
            let by_threads = [1, n_threads.unwrap_or(1)].map(|n| {
                let threads = pool(n);
                let mut probe = Probe::with_bytes(SHAPE, dtype, bytes, &threads).expect("less than a MiB");
                let rate = probe.attention_in_cache(isa, IN_CACHE_CONTEXT, 64 * n, 20, &threads);
                format!("{n}: {:.2}", rate.expect("f16 is the larger") / 1e9)
            });
            println!("{:10}  {dtype:4}  {}", isa.name(), by_threads.join(", "));
        }
    }
    compare(n_threads.unwrap_or(1), passes);
}

fn check(rate: &AttentionRate, dtype: KvDtype, isa: Isa) {
    let AttentionRate { context, largest_error, .. } = *rate;
    assert!(largest_error <= TOLERANCE(dtype), "{dtype}, {isa}, context {context}: off by {largest_error:e}");
}

/// What 8-bit keys and values gain, turn by turn, since memory has other guests, who come and go.
fn compare(n_threads: usize, passes: usize) {
    let threads = pool(n_threads);
    let rows = ROWS_PER_THREAD * n_threads;
    let [mut f16, mut int8] = [KvDtype::F16, KvDtype::Int8].map(|dtype| {
        Probe::new(SHAPE, dtype, rows, COMPARED[COMPARED.len() - 1], &threads)
            .expect("a quarter of the memory that is available")
    });
    println!("\ntokens/s of int8 over f16, turn by turn, {n_threads} threads, calls of {rows} rows");
    println!("level       context  int8 / f16   at one plain read   % of a plain read: f16  int8");
    for isa in Isa::available().into_iter().filter(|isa| isa.name() != "portable") {
        for context in COMPARED.into_iter().filter(|context| isa == Isa::best() || COMPARED_BY_ALL.contains(context)) {
            // None where a pool holds fewer rows: the two would do different work.
            let turn = |probe: &mut Probe, dtype| {
                let rate = probe.attention(isa, context, rows, 1, &threads).filter(|rate| rate.rows == rows)?;
                check(&rate, dtype, isa);
                Some(rate)
            };
            let turns: Option<Vec<(AttentionRate, AttentionRate)>> = (0..2 * passes + 1)
                .map(|_| Some((turn(&mut f16, KvDtype::F16)?, turn(&mut int8, KvDtype::Int8)?)))
                .collect();
            let Some(turns) = turns else { continue };
            let median = |of: fn(&(AttentionRate, AttentionRate)) -> f64| {
                let mut numbers: Vec<f64> = turns.iter().map(of).collect();
                numbers.sort_by(f64::total_cmp);
                numbers[numbers.len() / 2]
            };
            let ratio = median(|(f16, int8)| int8.tokens_per_s / f16.tokens_per_s);
            let same = median(|(f16, int8)| {
                int8.tokens_per_s / int8.read_bytes_per_s / (f16.tokens_per_s / f16.read_bytes_per_s)
            });
            let shares = [median(|(f16, _)| f16.share_of_read), median(|(_, int8)| int8.share_of_read)];
            let [f16, int8] = shares.map(|share| 100.0 * share);
            println!("{:10}  {context:7}  {ratio:9.2}x   {same:16.2}x   {f16:22.0}  {int8:4.0}", isa.name());
        }
    }
}

fn pool(threads: usize) -> rayon::ThreadPool {
    rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .start_handler(fulmen::cpu::pin_thread)
        .build()
        .expect("a pool of threads")
}
