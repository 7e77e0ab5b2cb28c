//! Throwaway: in-cache attention. args: isa[,isa] dtype[,dtype] contexts threads[,threads] seconds
use fulmen::cpu::isa::Isa;
use fulmen::cpu::measure::Probe;
use fulmen::model::AttentionShape;
use fulmen::policy::KvDtype;
fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let list = |i: usize| args[i].split(',').map(str::to_owned).collect::<Vec<_>>();
    let heads: usize = std::env::var("HEADS").ok().map_or(4, |x| x.parse().unwrap());
    let kv: usize = std::env::var("KV").ok().map_or(8, |x| x.parse().unwrap());
    let shape =
        AttentionShape { q_heads: kv * heads, kv_heads: kv, head_width: 128, window: None, scale: 0.088_388_35 };
    let seconds: f64 = args[4].parse().unwrap();
    for n in list(3) {
        let n: usize = n.parse().unwrap();
        let threads =
            rayon::ThreadPoolBuilder::new().num_threads(n).start_handler(fulmen::cpu::pin_thread).build().unwrap();
        for context in list(2) {
            let context: usize = context.parse().unwrap();
            for dtype in KvDtype::ALL {
                if !list(1).contains(&dtype.to_string()) {
                    continue;
                }
                for isa in Isa::available() {
                    if !list(0).iter().any(|x| x == isa.name()) {
                        continue;
                    }
                    let bytes = context * 2 * shape.kv_heads * shape.head_width * 2 + 65536;
                    let mut probe = Probe::with_bytes(shape, dtype, bytes, &threads).unwrap();
                    let start = std::time::Instant::now();
                    let mut all = Vec::new();
                    while start.elapsed().as_secs_f64() < seconds {
                        all.push(
                            threads.install(|| probe.attention_in_cache(isa, context, 4 * n, 9, &threads).unwrap())
                                / 1e9,
                        );
                    }
                    all.sort_by(f64::total_cmp);
                    println!(
                        "{n} threads {context} {dtype} {:10} median {:.2} best {:.2}",
                        isa.name(),
                        all[all.len() / 2],
                        all[all.len() - 1]
                    );
                }
            }
        }
    }
}
