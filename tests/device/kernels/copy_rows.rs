use fulmen::kernels::copy_rows::{Params, record};
use fulmen::reference::copy_rows::copy_rows;
use libtest_mimic::Trial;

use crate::common::{Random, download, pipelines, poisoned, run, upload};

pub fn trials() -> Vec<Trial> {
    vec![
        Trial::test("copy_rows::matches_reference", || {
            for (n_rows, row_words, from_stride, to_stride) in
                [(0, 1, 1, 1), (1, 1, 1, 3), (3, 255, 256, 255), (7, 256, 300, 256), (5, 257, 257, 700), (2, 0, 4, 4)]
            {
                let mut random = Random::new((n_rows * 1000 + row_words) as u64);
                let from: Vec<u32> = (0..n_rows * from_stride + 1).map(|_| random.bits() as u32).collect();
                let to = poisoned(n_rows * to_stride + 1);
                let mut want: Vec<u32> = download(to.whole());
                copy_rows(&from[..n_rows * from_stride], from_stride, &mut want, to_stride, row_words);
                let params = [n_rows, row_words, from_stride, to_stride].map(|n| n as u32);
                let [n_rows, row_words, from_stride, to_stride] = params;
                let params = Params { n_rows, row_words, from_stride, to_stride };
                let from = upload(&from);
                run(|recorder| record(recorder, params, from.whole(), to.whole()));
                assert_eq!(download::<u32>(to.whole()), want, "{params:?}");
            }
            Ok(())
        }),
        Trial::test("copy_rows::reaches_host_memory", || {
            let gpu = pipelines().gpu();
            assert!(gpu.kernels_reach_host(), "the tests' adapter is opened through Vulkan");
            let mut random = Random::new(3);
            let from: Vec<u32> = (0..1000).map(|_| random.bits() as u32).collect();
            let (there, back) = (gpu.host_buffer("rows", 4000)?, poisoned(1000));
            let params = Params { n_rows: 10, row_words: 100, from_stride: 100, to_stride: 100 };
            let source = upload(&from);
            run(|recorder| record(recorder, params, source.whole(), there.bound()));
            // SAFETY: `run` has waited for the kernel that wrote it.
            assert_eq!(unsafe { there.slice::<u32>(0..4000) }, from);
            run(|recorder| record(recorder, params, there.bound(), back.whole()));
            assert_eq!(download::<u32>(back.whole()), from);
            Ok(())
        }),
    ]
}
