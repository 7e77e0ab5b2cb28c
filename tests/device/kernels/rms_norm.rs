use fulmen::checkpoint::Dtype;
use fulmen::gpu::Recorder;
use fulmen::kernels::rms_norm::{Params, record};
use fulmen::reference::rms_norm::rms_norm;
use libtest_mimic::Trial;

use crate::common::{Random, assert_close, download, pipelines, poisoned, upload};

pub fn trials() -> Vec<Trial> {
    vec![Trial::test("rms_norm::matches_reference", || {
        for (n_rows, d_model) in [(0, 8), (1, 1), (3, 7), (5, 64), (2, 65), (17, 257)] {
            let mut random = Random::new((n_rows * 1000 + d_model) as u64);
            let (x, gain) = (random.values(n_rows * d_model), random.values(d_model));
            let y = poisoned(n_rows * d_model);
            let params = Params { n_rows: n_rows as u32, d_model: d_model as u32, eps: 1e-5 };
            let mut recorder = Recorder::new(pipelines());
            let (x_gpu, gain_gpu) = (upload(&x), upload(&gain));
            record(&mut recorder, Dtype::F32, params, x_gpu.whole(), gain_gpu.whole(), y.whole())?;
            recorder.submit()?;
            let got: Vec<f32> = download(y.slice(0..4 * (n_rows * d_model) as u64));
            let want = rms_norm(&x, &gain, 1e-5);
            // Both read the same f32 values: only the order of the D-term sum and rsqrt's last bits differ.
            assert_close("rms_norm", &got, &want, |i| 1e-5 * want[i].abs() + 1e-7);
        }
        Ok(())
    })]
}
