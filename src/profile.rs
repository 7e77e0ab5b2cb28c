//! What was measured on a machine: a [`Profile`]. Plain data between [`calibrate`](crate::calibrate), which fills it, and
//! [`plan`](crate::plan), which predicts from it.
//!
//! A time is a [`Curve`] over the size of the work (bytes, rows), not a rate: small work has latency, large work has
//! bandwidth, and kernels have tiles. No time of a whole pass or layer is in it: what a pass takes is for the simulation to say.
//!
//! A profile belongs to one adapter with one driver, one CPU, and one kind of layer with one format of weights
//! ([`MachineKey`], [`ModelKey`]). It is stored as JSON in the user's cache folder under a name made of both, and is refused, with
//! words, for any other.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::Inventory;
use crate::policy::{KvDtype, Precision, SourceKind};

/// Format of the file. A profile of another version is measured again.
pub const VERSION: u32 = 1;

/// Seconds (or a rate) over a size: straight lines between measured points, of which at least one is there.
///
/// Below the first point it is flat: the least work that was measured bounds less. Beyond the last it goes on in proportion:
/// where bandwidth is reached, twice the work takes twice the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(f64, f64)>", into = "Vec<(f64, f64)>")]
pub struct Curve {
    points: Vec<(f64, f64)>,
}

/// Points that are no curve.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CurveError {
    #[error("a curve needs a point")]
    Empty,
    #[error("point {0} of a curve is no pair of positive numbers, or not to the right of the one before")]
    Point(usize),
}

impl TryFrom<Vec<(f64, f64)>> for Curve {
    type Error = CurveError;

    fn try_from(points: Vec<(f64, f64)>) -> Result<Self, CurveError> {
        if points.is_empty() {
            return Err(CurveError::Empty);
        }
        for (index, (x, y)) in points.iter().enumerate() {
            let right = index == 0 || points[index - 1].0 < *x;
            if !(right && x.is_finite() && y.is_finite() && *x > 0.0 && *y >= 0.0) {
                return Err(CurveError::Point(index));
            }
        }
        Ok(Self { points })
    }
}

impl From<Curve> for Vec<(f64, f64)> {
    fn from(curve: Curve) -> Self {
        curve.points
    }
}

impl Curve {
    /// Of measured points where more never takes less: neighbours that say otherwise, which is noise, share their mean. One that is far
    /// above a later one was disturbed, which only adds, and is taken to be as that.
    pub fn rising(points: Vec<(f64, f64)>) -> Result<Curve, CurveError> {
        const FAR: f64 = 1.25;
        let mut points = Curve::try_from(points)?.points;
        let mut least = f64::INFINITY;
        for (_, y) in points.iter_mut().rev() {
            if *y > FAR * least {
                *y = least;
            }
            least = least.min(*y);
        }
        // Pools of neighbours: sum, and how many.
        let mut pools: Vec<(f64, usize)> = Vec::new();
        for (_, y) in &points {
            pools.push((*y, 1));
            while let [.., (before, n), (last, m)] = pools[..]
                && before / n as f64 > last / m as f64
            {
                pools.truncate(pools.len() - 2);
                pools.push((before + last, n + m));
            }
        }
        let levels = pools.iter().flat_map(|(sum, n)| std::iter::repeat_n(sum / *n as f64, *n));
        Ok(Curve { points: points.iter().zip(levels).map(|((x, _), y)| (*x, y)).collect() })
    }

    /// Time of work at a rate, after a latency.
    pub fn linear(latency: f64, rate: f64) -> Curve {
        // Two points fix the line; beyond the second it goes on in proportion, where the latency is nothing.
        let far = (latency * rate * 1e4).max(1.0);
        Curve { points: vec![(far * 1e-12, latency + far * 1e-12 / rate), (far, latency + far / rate)] }
    }

    /// The same value for all that there is.
    pub fn flat(y: f64) -> Curve {
        Curve { points: vec![(1e18, y)] }
    }

    pub fn points(&self) -> &[(f64, f64)] {
        &self.points
    }

    /// Value at `x`: see the type's text. Nothing takes no time.
    pub fn at(&self, x: f64) -> f64 {
        if x <= 0.0 {
            return 0.0;
        }
        let above = self.points.partition_point(|point| point.0 < x);
        match (above.checked_sub(1).map(|below| self.points[below]), self.points.get(above)) {
            (None, Some((_, y))) => *y,
            (Some((x0, y0)), Some((x1, y1))) => y0 + (y1 - y0) * (x - x0) / (x1 - x0),
            (Some((last, y)), None) => y * x / last,
            (None, None) => unreachable!("a curve has a point"),
        }
    }

    /// The same curve with every value times `factor`.
    pub fn scaled(&self, factor: f64) -> Curve {
        Curve { points: self.points.iter().map(|(x, y)| (*x, y * factor)).collect() }
    }
}

/// Seconds over two sizes: a curve for each of several values of the second one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<(f64, Curve)>", into = "Vec<(f64, Curve)>")]
pub struct Surface {
    curves: Vec<(f64, Curve)>,
}

impl TryFrom<Vec<(f64, Curve)>> for Surface {
    type Error = CurveError;

    fn try_from(curves: Vec<(f64, Curve)>) -> Result<Self, CurveError> {
        Curve::try_from(curves.iter().map(|(z, _)| (*z, 0.0)).collect::<Vec<_>>())?;
        Ok(Self { curves })
    }
}

impl From<Surface> for Vec<(f64, Curve)> {
    fn from(surface: Surface) -> Self {
        surface.curves
    }
}

impl Surface {
    pub fn curves(&self) -> &[(f64, Curve)] {
        &self.curves
    }

    /// Value at `x` for the second size `z`: straight between curves, in proportion to `z` beyond the last, and that of the
    /// first below it.
    pub fn at(&self, x: f64, z: f64) -> f64 {
        let above = self.curves.partition_point(|curve| curve.0 < z);
        match (above.checked_sub(1).map(|below| &self.curves[below]), self.curves.get(above)) {
            (None, Some((_, curve))) => curve.at(x),
            (Some((z0, low)), Some((z1, high))) => {
                let share = (z - z0) / (z1 - z0);
                low.at(x) * (1.0 - share) + high.at(x) * share
            }
            (Some((last, curve)), None) => curve.at(x) * z / last,
            (None, None) => unreachable!("a surface has a curve"),
        }
    }

    pub fn scaled(&self, factor: f64) -> Surface {
        Surface { curves: self.curves.iter().map(|(z, curve)| (*z, curve.scaled(factor))).collect() }
    }
}

/// What a profile is of, and valid for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineKey {
    pub adapter: String,
    pub driver: String,
    pub cpu: String,
    /// Threads that this process may run at a time.
    pub threads: usize,
    /// Instruction set of the CPU attention.
    pub isa: String,
}

impl MachineKey {
    /// This machine, with an adapter of it.
    pub fn of(adapter: &crate::gpu::AdapterSummary, isa: crate::cpu::isa::Isa) -> Self {
        Self {
            adapter: adapter.name.clone(),
            driver: adapter.driver.clone(),
            cpu: cpu_name(),
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            isa: isa.name().to_owned(),
        }
    }
}

/// Name of the CPU as the system gives it.
fn cpu_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.trim().strip_prefix(':'));
    name.map_or_else(|| std::env::consts::ARCH.to_owned(), |name| name.trim().to_owned())
}

/// Layers of one kind: the sizes that a stage's time depends on. How many layers there are does not matter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelKey {
    pub d_model: usize,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_width: usize,
    pub experts: usize,
    pub experts_per_token: usize,
    pub expert_width: usize,
    pub vocab: usize,
    /// Type of the experts' weights.
    pub expert_weights: String,
    /// What else a layer does (norms, biases, activation) follows from it.
    pub family: String,
    /// Operands of matrix products.
    pub precision: Precision,
}

impl ModelKey {
    pub fn of(inventory: &Inventory, precision: Precision) -> Self {
        let config = inventory.config();
        let shape = &config.shape;
        Self {
            d_model: shape.d_model,
            q_heads: shape.q_heads,
            kv_heads: shape.kv_heads,
            head_width: shape.head_width,
            experts: shape.experts,
            experts_per_token: shape.experts_per_token,
            expert_width: shape.expert_width,
            vocab: shape.vocab,
            expert_weights: inventory
                .expert_dtype()
                .map_or_else(|| "mixed".to_owned(), |dtype| dtype.name().to_owned()),
            family: config.family.name().to_owned(),
            precision,
        }
    }
}

/// Memory that was free.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Memory {
    /// Device memory in all, and what of it nobody had taken.
    pub device_bytes: u64,
    pub device_free_bytes: u64,
    /// Host memory that could be taken: what the system has, within the control group's limit.
    pub host_free_bytes: u64,
    /// Largest storage binding.
    pub binding_bytes: u64,
    pub kernels_reach_host: bool,
}

/// One page source that the machine granted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PageCurve {
    pub source: SourceKind,
    /// Seconds of a copy to the device, back to back with others, over its bytes.
    pub seconds: Curve,
}

/// What lies between host and device.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Link {
    pub to_device: Vec<PageCurve>,
    /// Seconds of a copy to the host over its bytes.
    pub to_host: Curve,
    /// Seconds of one piece of a copy of many pieces over the piece's bytes: keys and values go block by block.
    pub pieces: Curve,
    /// A small copy, from its submission until the host knows.
    pub small_seconds: f64,
    /// Factors by which copies slow down while others run in the other direction.
    pub to_device_beside_to_host: f64,
    pub to_host_beside_to_device: f64,
}

impl Link {
    /// Of the source asked for, else of the first one.
    pub fn pages(&self, source: Option<SourceKind>) -> Option<&PageCurve> {
        match source {
            Some(source) => self.to_device.iter().find(|pages| pages.source == source),
            None => self.to_device.first(),
        }
    }
}

/// Files that were read past the page cache, as pages are that come from their files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Disk {
    /// Which files: the weights of a folder, or a temporary one in it.
    pub what: String,
    /// Their file system reads past the page cache; else the cache was emptied of them first.
    pub direct: bool,
    /// Seconds in which all threads read a page, over its bytes.
    pub page_seconds: Curve,
}

/// How rows cross the link: by copies, or by kernels where those reach host memory. Seconds over rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RowTimes {
    pub to_host: Curve,
    pub to_device: Curve,
}

/// Stages of one layer on the GPU, each submitted back to back with others of its kind: the engine's own, with its kernels.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// Bytes read and written per second, from device memory to device memory.
    pub copy_bytes_per_s: f64,
    /// Between two submissions that do next to nothing.
    pub submit_seconds: f64,
    /// From handing over such a submission until the host knows that it has run.
    pub wait_seconds: f64,
    /// Seconds over rows.
    pub embed: Curve,
    pub pre_attention: Curve,
    pub post_attention: Curve,
    /// All experts of a layer in one task.
    pub experts: Curve,
    /// What a task over a part of the experts takes beside its share of that.
    pub experts_part: Curve,
    /// Final norm, LM head and ids, over rows that are sampled.
    pub head: Curve,
    pub rows_by_copies: RowTimes,
    pub rows_by_kernels: Option<RowTimes>,
    /// Decode attention: seconds over rows, for several lengths of context.
    pub decode_attention: Surface,
    /// Prompt attention: seconds over rows, for several lengths of prompt.
    pub prompt_attention: Surface,
}

/// Attention on the CPU.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// Bytes of keys and values per second over tokens of context, for several numbers of threads (ascending); those kept in f16, and
    /// those in 8 bits.
    pub attention: Vec<ThreadCurve>,
    pub attention_int8: Vec<ThreadCurve>,
    /// A task over hardly anything: waking the threads and coming back.
    pub task_seconds: f64,
    /// Seconds in which a layer's new keys and values are stored, over rows.
    pub store: Curve,
    /// Bytes that plain loads read per second, over threads.
    pub dram_read: Curve,
}

/// Rates for one number of threads.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ThreadCurve {
    pub threads: usize,
    pub bytes_per_s: Curve,
}

impl Cpu {
    /// Bytes per second that `threads` attend at over contexts of `tokens`. Flat at both ends: a rate does not grow for ever.
    pub fn attention_rate(&self, kv: KvDtype, threads: usize, tokens: f64) -> f64 {
        let measured = match kv {
            KvDtype::F16 => &self.attention,
            KvDtype::Int8 => &self.attention_int8,
        };
        let rate = |curve: &Curve| {
            let points = curve.points();
            let (first, last) = (points[0].0, points[points.len() - 1].0);
            curve.at(tokens.clamp(first, last))
        };
        let above = measured.partition_point(|of| of.threads < threads);
        match (above.checked_sub(1).map(|below| &measured[below]), measured.get(above)) {
            (None, Some(high)) => rate(&high.bytes_per_s) * threads as f64 / high.threads as f64,
            (Some(low), Some(high)) => {
                let share = (threads - low.threads) as f64 / (high.threads - low.threads) as f64;
                rate(&low.bytes_per_s) * (1.0 - share) + rate(&high.bytes_per_s) * share
            }
            (Some(low), None) => rate(&low.bytes_per_s),
            (None, None) => f64::INFINITY,
        }
    }

    /// The number of threads that attends fastest, of those measured.
    pub fn best_threads(&self) -> usize {
        let rate = |of: &ThreadCurve| of.bytes_per_s.points().last().map_or(0.0, |point| point.1);
        let best = self.attention.iter().fold(None, |best: Option<&ThreadCurve>, of| match best {
            Some(best) if rate(best) >= rate(of) => Some(best),
            _ => Some(of),
        });
        best.map_or(1, |of| of.threads)
    }
}

/// Tokens of the contexts that attention has where [`Contention`] is measured.
pub const CONTENTION_TOKENS: usize = 512;

/// Factors, at least 1, by which work slows down beside other work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contention {
    /// Pages while the CPU attends with its best number of threads, and the other way round.
    pub pages_beside_attention: f64,
    pub attention_beside_pages: f64,
    /// Kernels of the stages while pages come, and the other way round.
    pub kernels_beside_pages: f64,
    pub pages_beside_kernels: f64,
    /// Kernels that read or write host memory while pages come.
    pub rows_beside_pages: f64,
    /// Bytes per second of keys and values, and of pages, alone, where the first two were measured. 0: not known.
    #[serde(default)]
    pub attention_bytes_per_s: f64,
    #[serde(default)]
    pub page_bytes_per_s: f64,
}

impl Contention {
    /// Nothing disturbs anything.
    pub const NONE: Contention = Contention {
        pages_beside_attention: 1.0,
        attention_beside_pages: 1.0,
        kernels_beside_pages: 1.0,
        pages_beside_kernels: 1.0,
        rows_beside_pages: 1.0,
        attention_bytes_per_s: 0.0,
        page_bytes_per_s: 0.0,
    };

    /// Factors of pages and of attention where attention asks for `share` of the bytes per second that it did when they were measured:
    /// they slow down by what both ask for beyond what the memory gave them together.
    pub fn of_attention(&self, share: f64) -> (f64, f64) {
        let (pages, attention) = (self.pages_beside_attention, self.attention_beside_pages);
        let (read, copied) = (self.attention_bytes_per_s, self.page_bytes_per_s);
        let beyond = |read: f64| read + copied - (self.attention_bytes_per_s / attention + copied / pages);
        let most = beyond(read);
        let part = if most > 0.0 { (beyond(share * read) / most).clamp(0.0, 1.0) } else { 1.0 };
        (1.0 + part * (pages - 1.0), 1.0 + part * (attention - 1.0))
    }
}

/// What the engine's host side takes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    /// A pass's schedule built and checked, over its tasks.
    pub schedule: Curve,
    /// Handing a task over to the lane that waits for it.
    pub task_seconds: f64,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    pub version: u32,
    pub machine: MachineKey,
    pub model: ModelKey,
    pub memory: Memory,
    pub link: Link,
    /// Where weights that do not fit the host's memory are read from; None: it could not be measured.
    #[serde(default)]
    pub disk: Option<Disk>,
    pub gpu: Gpu,
    pub cpu: Cpu,
    pub contention: Contention,
    pub host: Host,
}

/// A profile cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("profile {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },
    #[error("profile {}: {source}", path.display())]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("profile {}: it is of format {found}, this fulmen writes {VERSION}; `fulmen calibrate` measures anew", path.display())]
    Version { path: PathBuf, found: u64 },
    #[error("the profile is of another {what}: {}; `fulmen calibrate` measures this one", differences.join(", "))]
    Other { what: &'static str, differences: Vec<String> },
    #[error("there is no folder for caches: neither FULMEN_CACHE_DIR nor XDG_CACHE_HOME nor HOME is set")]
    NoCacheFolder,
}

/// Fields in which two keys differ: `driver 580.1 (here: 581.0)`.
fn differences<T: Serialize>(theirs: &T, ours: &T) -> Vec<String> {
    let fields =
        |key: &T| serde_json::to_value(key).ok().and_then(|value| value.as_object().cloned()).unwrap_or_default();
    let (theirs, ours) = (fields(theirs), fields(ours));
    let word = |value: Option<&serde_json::Value>| match value {
        Some(serde_json::Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
        None => "nothing".to_owned(),
    };
    theirs
        .iter()
        .filter(|(field, value)| ours.get(*field) != Some(value))
        .map(|(field, value)| format!("{field} {} (here: {})", word(Some(value)), word(ours.get(field))))
        .collect()
}

impl Profile {
    /// The same machine with so many bytes per second more over the link, both ways.
    pub fn with_faster_link(&self, more: f64) -> Profile {
        let faster = |curve: &Curve| {
            let (bytes, seconds) = curve.points[curve.points.len() - 1];
            let rate = bytes / seconds.max(1e-12);
            curve.scaled(rate / (rate + more))
        };
        let mut profile = self.clone();
        let link = &mut profile.link;
        link.to_device.iter_mut().for_each(|pages| pages.seconds = faster(&pages.seconds));
        link.to_host = faster(&link.to_host);
        link.pieces = faster(&link.pieces);
        profile
    }

    /// The same machine with so many bytes per second more in attention on the CPU, at its best number of threads.
    pub fn with_faster_attention(&self, more: f64) -> Profile {
        let rate = self.cpu.attention_rate(KvDtype::F16, self.cpu.best_threads(), 1024.0);
        let mut profile = self.clone();
        let cpu = &mut profile.cpu;
        for of in cpu.attention.iter_mut().chain(&mut cpu.attention_int8) {
            of.bytes_per_s = of.bytes_per_s.scaled((rate + more) / rate);
        }
        profile
    }

    /// Refuses, with what differs, a machine or a kind of layers that the profile is not of.
    pub fn check(&self, machine: &MachineKey, model: &ModelKey) -> Result<(), ProfileError> {
        let of_machine = differences(&self.machine, machine);
        if !of_machine.is_empty() {
            return Err(ProfileError::Other { what: "machine", differences: of_machine });
        }
        let of_model = differences(&self.model, model);
        if !of_model.is_empty() {
            return Err(ProfileError::Other { what: "kind of model", differences: of_model });
        }
        Ok(())
    }

    pub fn read(path: &Path) -> Result<Profile, ProfileError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ProfileError::Io { path: path.to_owned(), source })?;
        let parse = |source| ProfileError::Parse { path: path.to_owned(), source };
        let value: serde_json::Value = serde_json::from_str(&text).map_err(parse)?;
        // Looked at first: what another version has in it would only confuse.
        match value.get("version").and_then(serde_json::Value::as_u64) {
            Some(found) if found != u64::from(VERSION) => Err(ProfileError::Version { path: path.to_owned(), found }),
            _ => serde_json::from_value(value).map_err(parse),
        }
    }

    /// Writes it whole or not at all.
    pub fn write(&self, path: &Path) -> Result<(), ProfileError> {
        let io = |source| ProfileError::Io { path: path.to_owned(), source };
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder).map_err(io)?;
        let mut file = tempfile::NamedTempFile::new_in(folder).map_err(io)?;
        let text = serde_json::to_string_pretty(self).expect("a profile is plain data");
        std::io::Write::write_all(&mut file, text.as_bytes()).map_err(io)?;
        file.persist(path).map_err(|error| io(error.error))?;
        Ok(())
    }

    /// Where the profile of a machine and a kind of layers is kept: in `profiles` below the folder for caches.
    pub fn cache_path(machine: &MachineKey, model: &ModelKey) -> Result<PathBuf, ProfileError> {
        let folder = cache_folder().ok_or(ProfileError::NoCacheFolder)?;
        let word: String = machine.adapter.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let key = serde_json::to_string(&(machine, model)).expect("plain data");
        let word: String = word.to_ascii_lowercase().chars().take(40).collect();
        Ok(folder.join("profiles").join(format!("{word}-{:016x}.json", fnv1a(key.as_bytes()))))
    }

    /// The cached profile of a machine and a kind of layers; None where there is none yet.
    pub fn cached(machine: &MachineKey, model: &ModelKey) -> Result<Option<Profile>, ProfileError> {
        let path = Self::cache_path(machine, model)?;
        if !path.exists() {
            return Ok(None);
        }
        let profile = Self::read(&path)?;
        profile.check(machine, model)?;
        Ok(Some(profile))
    }
}

/// Where what was measured is kept: `$FULMEN_CACHE_DIR`, else `$XDG_CACHE_HOME/fulmen`, else `~/.cache/fulmen`.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    variable("FULMEN_CACHE_DIR")
        .or_else(|| variable("XDG_CACHE_HOME").map(|folder| folder.join("fulmen")))
        .or_else(|| variable("HOME").map(|folder| folder.join(".cache").join("fulmen")))
}

/// FNV-1a: a name for a file, not a secret.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}
