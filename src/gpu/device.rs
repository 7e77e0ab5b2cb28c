//! The adapter that was chosen, opened, and watched for faults.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::buffer::{Buffer, CopyRange, HostBuffer, Keep};
use super::timing::Clock;
use super::transfer::plain::PlainTransfer;
use super::transfer::{HostMemoryRefused, Line, Ticket, Transfer, TransferChoice, vulkan};
use super::uploads::Uploads;
use super::workgroup_matrices;

/// What the GPU side can fail with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GpuError {
    #[error(
        "no Vulkan adapter answers; install a driver (on Debian: apt-get install mesa-vulkan-drivers libvulkan1 \
         for the software one, lavapipe)"
    )]
    NoAdapter,
    #[error("no adapter matches '{wanted}'; there are: {found}")]
    NoSuchAdapter { wanted: String, found: String },
    #[error("adapter {adapter} lacks {feature}, which every kernel needs")]
    MissingFeature { adapter: String, feature: &'static str },
    #[error("adapter {adapter} would not open: {cause}")]
    Open { adapter: String, cause: String },
    #[error("out of device memory: {what} needs {needed} bytes beside the {taken} bytes already taken ({cause})")]
    OutOfMemory { what: String, needed: u64, taken: u64, cause: String },
    #[error("{what} needs {needed} bytes in one binding, the adapter allows {limit}")]
    BindingTooLarge { what: String, needed: u64, limit: u64 },
    #[error("shader {kernel}: {cause}")]
    Shader { kernel: String, cause: String },
    #[error(transparent)]
    HostMemory(HostMemoryRefused),
    #[error("the device was lost: {0}")]
    Lost(String),
}

/// One line of `fulmen devices`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct AdapterSummary {
    pub index: usize,
    pub name: String,
    /// discrete, integrated, virtual, cpu or other
    pub kind: String,
    pub backend: String,
    pub driver: String,
    /// Largest storage binding in bytes.
    pub max_binding_bytes: u64,
    pub max_buffer_bytes: u64,
    pub workgroup_memory_bytes: u32,
    pub subgroup_sizes: (u32, u32),
    /// Has what every kernel needs.
    pub usable: bool,
    /// Has 16x16x16 cooperative matrices of f16 with f32 sums, and subgroups of 32 lanes: what the kernels that use them need.
    pub cooperative: bool,
    /// Has VK_NV_cooperative_matrix2 with all that the kernels in SPIR-V need of it: matrices that a whole workgroup holds.
    pub workgroup_matrices: bool,
}

/// Which adapter to open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best kind there is: discrete before integrated before virtual before CPU.
    #[default]
    Best,
    /// By its number in `fulmen devices`.
    Index(usize),
    /// By a part of its name, case ignored.
    Name(String),
}

impl From<&str> for DeviceChoice {
    fn from(text: &str) -> Self {
        match text.parse() {
            Ok(index) => DeviceChoice::Index(index),
            Err(_) => DeviceChoice::Name(text.to_owned()),
        }
    }
}

/// An open device, its queue, and how bytes get to and from it.
pub struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    pub(super) transfer: Arc<dyn Transfer>,
    pub(super) clock: Option<Clock>,
    pub(super) uploads: Mutex<Uploads>,
    summary: AdapterSummary,
    limits: wgpu::Limits,
    faults: Arc<Faults>,
    test_faults: TestFaults,
    /// [`TestFaults::emulated_matrices`], where it is of use.
    pub(super) emulates_cooperative: bool,
    workgroup_matrices: bool,
    taken: Arc<AtomicU64>,
    /// Most that was taken.
    peak: AtomicU64,
    pace: Option<Pace>,
    /// A pass is under way: wgpu's own staging, which allocates, is not for now.
    in_pass: AtomicBool,
}

/// What went wrong outside of a call: a lost device, or an error that wgpu reported with nobody waiting for it. The first
/// one stays, and every later call fails with it.
#[derive(Default)]
pub(super) struct Faults {
    first: Mutex<Option<String>>,
    submissions: AtomicU64,
}

impl Faults {
    pub fn set(&self, fault: String) {
        self.first.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).get_or_insert(fault);
    }

    pub fn check(&self) -> Result<(), GpuError> {
        match self.first.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).as_ref() {
            Some(fault) => Err(GpuError::Lost(fault.clone())),
            None => Ok(()),
        }
    }

    pub fn count_submission(&self, test_faults: &TestFaults) -> Result<(), GpuError> {
        let n = self.submissions.fetch_add(1, Relaxed) + 1;
        if test_faults.lost_after.is_some_and(|after| n > after) {
            self.set(format!("a test fault after {n} submissions"));
        }
        self.check()
    }
}

/// Faults that a test plants where the hardware would have to break. None by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TestFaults {
    /// Host memory of the driver for pages is refused.
    pub pinned_refused: bool,
    /// Importing host memory is refused.
    pub import_refused: bool,
    /// The device is lost after so many submissions.
    pub lost_after: Option<u64>,
    /// Shared device buffers beyond so many bytes in all are refused.
    pub device_bytes: Option<u64>,
    /// No fault, but a machine that is not there either: where the adapter has no cooperative matrices but has f16, they are emulated.
    pub emulated_matrices: bool,
    /// No fault: matrices of a whole workgroup are left alone, as on an adapter without them.
    pub no_workgroup_matrices: bool,
}

impl std::str::FromStr for TestFaults {
    type Err = String;

    /// `pinned-refused,import-refused,lost-after=40,device-bytes=1000000,emulated-matrices,no-workgroup-matrices`, any of them.
    fn from_str(text: &str) -> Result<Self, String> {
        let mut faults = TestFaults::default();
        for word in text.split(',').filter(|word| !word.is_empty()) {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<u64>().map_err(|error| format!("{word}: {error}"));
            match name {
                "pinned-refused" => faults.pinned_refused = true,
                "import-refused" => faults.import_refused = true,
                "emulated-matrices" => faults.emulated_matrices = true,
                "no-workgroup-matrices" => faults.no_workgroup_matrices = true,
                "lost-after" => faults.lost_after = Some(number()?),
                "device-bytes" => faults.device_bytes = Some(number()?),
                _ => return Err(format!("'{word}' is no test fault")),
            }
        }
        Ok(faults)
    }
}

/// How to open a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenOptions {
    pub device: DeviceChoice,
    pub transfer: TransferChoice,
    pub test_faults: TestFaults,
    /// Most bytes per second to the device. Kernels do not reach host memory then, since nothing could pace them.
    pub link_pace: Option<u64>,
}

/// Holds copies to the device back, as a slower link would.
struct Pace {
    bytes_per_s: u64,
    /// When the slower link would have brought all that was copied so far.
    free_at: Mutex<Instant>,
}

impl Pace {
    /// Returns when a slower link would have brought so many bytes.
    fn take(&self, bytes: u64) {
        let mut free_at = self.free_at.lock().expect("pace lock");
        *free_at = (*free_at).max(Instant::now()) + Duration::from_secs_f64(bytes as f64 / self.bytes_per_s as f64);
        std::thread::sleep(free_at.saturating_duration_since(Instant::now()));
    }
}

/// `Device::poll` panics when the driver reports a lost device (wgpu 30, backend/wgpu_core.rs); here it is an error.
pub(super) fn poll(device: &wgpu::Device, how: wgpu::PollType, faults: &Faults) -> Result<(), GpuError> {
    let polled = catch_unwind(AssertUnwindSafe(|| device.poll(how)));
    faults.check()?;
    match polled {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(GpuError::Lost(error.to_string())),
        Err(_) => Err(GpuError::Lost("the driver reported a lost device".to_owned())),
    }
}

/// Immediates hold a kernel's parameters: 128 bytes is what every Vulkan driver has.
const MAX_PARAM_BYTES: u32 = 128;

fn backends() -> wgpu::Backends {
    let mut backends = wgpu::Backends::VULKAN;
    if cfg!(feature = "metal") {
        backends |= wgpu::Backends::METAL;
    }
    if cfg!(feature = "dx12") {
        backends |= wgpu::Backends::DX12;
    }
    backends
}

fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: backends(),
        // No validation of indirect calls, no debug layer: `make test-validation` asks for layers by environment.
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    pollster::block_on(instance.enumerate_adapters(backends()))
}

/// What WGSL needs for f16 cooperative matrices.
fn cooperative_features() -> wgpu::Features {
    wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX | wgpu::Features::SHADER_F16
}

fn has_cooperative_matrices(adapter: &wgpu::Adapter, subgroups: (u32, u32)) -> bool {
    use wgpu::CooperativeScalarType as Scalar;
    let fits = |p: &wgpu::CooperativeMatrixProperties| {
        (p.m_size, p.n_size, p.k_size) == (16, 16, 16) && p.ab_type == Scalar::F16 && p.cr_type == Scalar::F32
    };
    subgroups == (32, 32)
        && adapter.features().contains(cooperative_features())
        && adapter.cooperative_matrix_properties().iter().any(fits)
}

fn summarise(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    let cooperative = has_cooperative_matrices(adapter, (info.subgroup_min_size, info.subgroup_max_size));
    AdapterSummary {
        index,
        name: info.name,
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "cpu",
            wgpu::DeviceType::Other => "other",
        }
        .to_owned(),
        backend: format!("{:?}", info.backend).to_lowercase(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        workgroup_memory_bytes: limits.max_compute_workgroup_storage_size,
        subgroup_sizes: (info.subgroup_min_size, info.subgroup_max_size),
        usable: adapter.features().contains(wgpu::Features::IMMEDIATES),
        cooperative,
        workgroup_matrices: cooperative && workgroup_matrices::are_there(adapter),
    }
}

/// Every adapter that answers, in the order that `--device N` counts.
pub fn list_adapters() -> Vec<AdapterSummary> {
    adapters().iter().enumerate().map(|(index, adapter)| summarise(index, adapter)).collect()
}

impl Gpu {
    pub fn open(choice: &DeviceChoice) -> Result<Gpu, GpuError> {
        Self::open_with(&OpenOptions { device: choice.clone(), ..OpenOptions::default() })
    }

    pub fn open_with(options: &OpenOptions) -> Result<Gpu, GpuError> {
        let choice = &options.device;
        let adapters = adapters();
        let summaries: Vec<_> = adapters.iter().enumerate().map(|(i, a)| summarise(i, a)).collect();
        if adapters.is_empty() {
            return Err(GpuError::NoAdapter);
        }
        let rank = |kind: &str| ["discrete", "integrated", "virtual", "other", "cpu"].iter().position(|k| *k == kind);
        let chosen = match choice {
            DeviceChoice::Best => summaries.iter().min_by_key(|s| (!s.usable, rank(&s.kind), s.index)),
            DeviceChoice::Index(index) => summaries.get(*index),
            DeviceChoice::Name(name) => summaries.iter().find(|s| s.name.to_lowercase().contains(&name.to_lowercase())),
        };
        let Some(summary) = chosen.cloned() else {
            let wanted = match choice {
                DeviceChoice::Index(index) => index.to_string(),
                DeviceChoice::Name(name) => name.clone(),
                DeviceChoice::Best => unreachable!("the best of at least one adapter exists"),
            };
            let found = summaries.iter().map(|s| format!("{}: {}", s.index, s.name)).collect::<Vec<_>>().join(", ");
            return Err(GpuError::NoSuchAdapter { wanted, found });
        };
        let adapter = &adapters[summary.index];
        if !summary.usable {
            return Err(GpuError::MissingFeature { adapter: summary.name, feature: "immediates (push constants)" });
        }
        let limits = wgpu::Limits { max_immediate_size: MAX_PARAM_BYTES, ..adapter.limits() };
        let timestamps = wgpu::Features::TIMESTAMP_QUERY | wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS;
        let mut features = wgpu::Features::IMMEDIATES | adapter.features() & timestamps;
        let f16 = wgpu::Features::SHADER_F16;
        let emulates =
            !summary.cooperative && options.test_faults.emulated_matrices && adapter.features().contains(f16);
        if summary.cooperative {
            features |= cooperative_features();
        } else if emulates {
            features |= f16;
        }
        // wgpu's own way to open a device has no room for the extension.
        let workgroup_matrices = summary.workgroup_matrices
            && !options.test_faults.no_workgroup_matrices
            && options.transfer == TransferChoice::Best;
        if workgroup_matrices {
            features |= wgpu::Features::PASSTHROUGH_SHADERS;
        }
        let open = |cause: String| GpuError::Open { adapter: summary.name.clone(), cause };
        let faults = Arc::new(Faults::default());
        let beside = match options.transfer {
            TransferChoice::Plain => None,
            TransferChoice::Best => {
                let wanted = (features, &limits, workgroup_matrices);
                vulkan::open(adapter, wanted, faults.clone(), options.test_faults)
            }
        };
        let (device, queue, transfer) = match beside {
            Some(opened) => {
                let (device, queue, transfer) = opened.map_err(open)?;
                (device, queue, Arc::new(transfer) as Arc<dyn Transfer>)
            }
            None => {
                let descriptor = wgpu::DeviceDescriptor {
                    label: Some("fulmen"),
                    required_features: features,
                    required_limits: limits.clone(),
                    memory_hints: wgpu::MemoryHints::MemoryUsage,
                    // SAFETY: of what is experimental only cooperative matrices are used, where the adapter lists them.
                    experimental_features: unsafe { wgpu::ExperimentalFeatures::enabled() },
                    ..Default::default()
                };
                let (device, queue) =
                    pollster::block_on(adapter.request_device(&descriptor)).map_err(|error| open(error.to_string()))?;
                let transfer = PlainTransfer::new(device.clone(), queue.clone(), faults.clone(), options.test_faults);
                (device, queue, Arc::new(transfer) as Arc<dyn Transfer>)
            }
        };

        // wgpu's default handlers panic. Keep the first fault; every wait looks at it.
        let on_lost = faults.clone();
        device.set_device_lost_callback(move |reason, message| on_lost.set(format!("{reason:?}: {message}")));
        let on_error = faults.clone();
        device.on_uncaptured_error(Arc::new(move |error| on_error.set(error.to_string())));
        let clock = features.contains(timestamps).then(|| Clock::new(&queue));
        Ok(Gpu {
            device,
            queue,
            transfer,
            clock,
            uploads: Mutex::default(),
            summary,
            limits,
            faults,
            test_faults: options.test_faults,
            emulates_cooperative: emulates,
            workgroup_matrices,
            pace: options.link_pace.map(|bytes_per_s| Pace { bytes_per_s, free_at: Mutex::new(Instant::now()) }),
            taken: Arc::new(AtomicU64::new(0)),
            peak: AtomicU64::new(0),
            in_pass: AtomicBool::new(false),
        })
    }

    /// In words: where copies run.
    pub fn transfer_words(&self) -> String {
        self.transfer.describe()
    }

    /// Kernels can bind [`HostBuffer`]s.
    pub fn kernels_reach_host(&self) -> bool {
        self.pace.is_none() && self.transfer.kernels_reach_host()
    }

    pub fn summary(&self) -> &AdapterSummary {
        &self.summary
    }

    /// Kernels may use cooperative matrices; see [`AdapterSummary::cooperative`] and [`TestFaults::emulated_matrices`].
    pub fn cooperative(&self) -> bool {
        self.summary.cooperative || self.emulates_cooperative
    }

    /// Kernels in SPIR-V may use matrices that a whole workgroup holds; see [`AdapterSummary::workgroup_matrices`].
    pub fn workgroup_matrices(&self) -> bool {
        self.workgroup_matrices
    }

    /// Largest storage binding in bytes.
    pub fn max_binding_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size
    }

    /// Bytes of workgroup memory that one workgroup may use.
    pub fn workgroup_memory_bytes(&self) -> u32 {
        self.limits.max_compute_workgroup_storage_size
    }

    /// Most workgroups in one dimension of a dispatch; 65,535 on most drivers.
    pub fn max_workgroups(&self) -> u32 {
        self.limits.max_compute_workgroups_per_dimension
    }

    /// Alignment of a [`Slice`](super::Slice)'s offset, in bytes.
    pub fn binding_alignment(&self) -> u64 {
        self.limits.min_storage_buffer_offset_alignment as u64
    }

    /// Size of the largest memory heap on the device; None where the backend does not say.
    pub fn memory_bytes(&self) -> Option<u64> {
        // SAFETY: the handles are only asked for properties, and live as long as the device that the guard holds.
        let heaps = unsafe {
            let device = self.device.as_hal::<wgpu::hal::api::Vulkan>()?;
            let instance = device.shared_instance().raw_instance();
            instance.get_physical_device_memory_properties(device.raw_physical_device())
        };
        let local = |heap: &&ash::vk::MemoryHeap| heap.flags.contains(ash::vk::MemoryHeapFlags::DEVICE_LOCAL);
        heaps.memory_heaps_as_slice().iter().filter(local).map(|heap| heap.size).max()
    }

    /// Bytes of the largest device heap that nobody has taken, this process aside; None where the driver does not say
    /// (VK_EXT_memory_budget).
    pub fn free_memory_bytes(&self) -> Option<u64> {
        self.memory_budget().map(|(budget, _)| budget)
    }

    /// Bytes of that heap that this process has by the driver's count: buffers, and what the driver and wgpu add to them.
    pub fn used_memory_bytes(&self) -> Option<u64> {
        self.memory_budget().map(|(_, usage)| usage)
    }

    /// What may be taken of the largest device heap and what is, by this process.
    fn memory_budget(&self) -> Option<(u64, u64)> {
        // SAFETY: the handles are only asked for properties, and live as long as the device that the guard holds; the
        // structures live until the calls return.
        let (heaps, budget, usage) = unsafe {
            let device = self.device.as_hal::<wgpu::hal::api::Vulkan>()?;
            let instance = device.shared_instance().raw_instance();
            let physical = device.raw_physical_device();
            let extensions = instance.enumerate_device_extension_properties(physical).ok()?;
            let named =
                |it: &ash::vk::ExtensionProperties| it.extension_name_as_c_str() == Ok(ash::ext::memory_budget::NAME);
            if !extensions.iter().any(named) {
                return None;
            }
            let mut budget = ash::vk::PhysicalDeviceMemoryBudgetPropertiesEXT::default();
            let mut properties = ash::vk::PhysicalDeviceMemoryProperties2::default().push_next(&mut budget);
            instance.get_physical_device_memory_properties2(physical, &mut properties);
            (properties.memory_properties, budget.heap_budget, budget.heap_usage)
        };
        let local = |heap: &ash::vk::MemoryHeap| heap.flags.contains(ash::vk::MemoryHeapFlags::DEVICE_LOCAL);
        let counts = budget.into_iter().zip(usage);
        let heaps = heaps.memory_heaps_as_slice().iter().zip(counts).filter(|(heap, _)| local(heap));
        heaps.max_by_key(|(heap, _)| heap.size).map(|(_, counts)| counts)
    }

    /// Bytes of device memory in live buffers.
    pub fn taken_bytes(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// Most bytes of device memory that live buffers had at a time, since it was last asked.
    pub fn take_peak_bytes(&self) -> u64 {
        self.peak.swap(self.taken_bytes(), Relaxed)
    }

    /// Counts a buffer that was made; it counts itself out when it goes.
    fn take(&self, size: u64) {
        let taken = self.taken.fetch_add(size, Relaxed) + size;
        self.peak.fetch_max(taken, Relaxed);
    }

    /// A storage buffer of `bytes` (rounded up to 4, at least 4), contents zero. It can be copied from and to.
    pub fn buffer(&self, what: &str, bytes: u64) -> Result<Buffer, GpuError> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        self.allocate(what, bytes, usage)
    }

    /// A storage buffer holding `contents`, padded with zeros to a multiple of 4 bytes.
    pub fn buffer_with(&self, what: &str, contents: &[u8]) -> Result<Buffer, GpuError> {
        let buffer = self.buffer(what, contents.len() as u64)?;
        self.write(&buffer, 0, contents);
        Ok(buffer)
    }

    /// `bytes` rounded up to whole words, if they fit one binding.
    fn bindable(&self, what: &str, bytes: u64) -> Result<u64, GpuError> {
        let (needed, limit) = (bytes.next_multiple_of(4).max(4), self.max_binding_bytes());
        match needed > limit {
            true => Err(GpuError::BindingTooLarge { what: what.to_owned(), needed, limit }),
            false => Ok(needed),
        }
    }

    fn allocate(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<Buffer, GpuError> {
        let size = match usage.contains(wgpu::BufferUsages::STORAGE) {
            true => self.bindable(what, bytes)?,
            false => bytes.next_multiple_of(4).max(4),
        };
        let out_of_memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let invalid = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let raw = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage,
            mapped_at_creation: false,
        });
        let cause = pollster::block_on(invalid.pop()).or(pollster::block_on(out_of_memory.pop()));
        if let Some(cause) = cause {
            return Err(GpuError::OutOfMemory {
                what: what.to_owned(),
                needed: size,
                taken: self.taken_bytes(),
                cause: cause.to_string(),
            });
        }
        self.take(size);
        Ok(Buffer::new(raw, size, self.taken.clone()))
    }

    /// A storage buffer of `bytes` (rounded up to 4, at least 4) that copies of a transfer reach too. What it holds at first
    /// is anything.
    pub fn shared_buffer(&self, what: &str, bytes: u64) -> Result<Buffer, GpuError> {
        let size = self.bindable(what, bytes)?;
        let refused = |cause: String| GpuError::OutOfMemory {
            what: what.to_owned(),
            needed: size,
            taken: self.taken_bytes(),
            cause,
        };
        if self.test_faults.device_bytes.is_some_and(|most| self.taken_bytes() + size > most) {
            return Err(refused("a test fault".to_owned()));
        }
        let shared = self.transfer.shared_buffer(what, size).map_err(refused)?;
        self.take(size);
        Ok(match shared.handle {
            Some((handle, keep)) => Buffer::shared(shared.raw, handle, keep, size, self.taken.clone()),
            None => Buffer::new(shared.raw, size, self.taken.clone()),
        })
    }

    /// Host memory of the driver, rounded up to 4 bytes, that kernels bind as well where they reach host memory at all.
    pub fn host_buffer(&self, what: &str, bytes: u64) -> Result<HostBuffer, HostMemoryRefused> {
        let (memory, view) = self.transfer.host_memory(what, bytes.next_multiple_of(4).max(4), true)?;
        Ok(HostBuffer { memory, view })
    }

    /// Host memory of the driver that only copies reach: of any size.
    pub fn pinned(&self, what: &str, bytes: u64) -> Result<HostBuffer, HostMemoryRefused> {
        let (memory, view) = self.transfer.host_memory(what, bytes.next_multiple_of(4).max(4), false)?;
        Ok(HostBuffer { memory, view })
    }

    /// Memory of this process that copies reach from now on, without a copy of it.
    ///
    /// # Safety
    /// * `pointer` is the start of `bytes` readable bytes, both multiples of 4096, that live as long as `keep`.
    /// * What writes them is ordered against the copies that read them.
    pub(crate) unsafe fn import(
        &self,
        what: &str,
        pointer: *mut u8,
        bytes: u64,
        keep: Keep,
    ) -> Result<HostBuffer, HostMemoryRefused> {
        Ok(HostBuffer { memory: self.transfer.import(what, pointer, bytes, keep)?, view: None })
    }

    /// Copies when `after` has been reached; all of one call in one direction, which `line` names.
    pub fn copy(&self, line: Line, copies: &[CopyRange<'_>], after: &[Ticket]) -> Result<Ticket, GpuError> {
        if let (Some(pace), Line::ToDevice) = (&self.pace, line) {
            pace.take(copies.iter().map(|copy| copy.bytes).sum());
        }
        self.transfer.copy(line, copies, after)
    }

    /// Blocks until a ticket is reached; then what its work wrote to host memory is there.
    pub fn wait_for(&self, ticket: Ticket) -> Result<(), GpuError> {
        self.transfer.wait(ticket)
    }

    /// From here to [`end_pass`](Self::end_pass) nothing goes through wgpu's own staging, which allocates for every write.
    pub fn begin_pass(&self) {
        self.uploads.lock().expect("uploads lock").reset();
        self.in_pass.store(true, Relaxed);
    }

    pub fn end_pass(&self) {
        self.in_pass.store(false, Relaxed);
    }

    /// When the work of each ticket ran, as host times, once all of it has. None for those whose queue keeps no time.
    pub fn take_spans(&self, tickets: &[Ticket]) -> Result<Vec<Option<(Instant, Instant)>>, GpuError> {
        let Some(clock) = &self.clock else { return Ok(vec![None; tickets.len()]) };
        clock.take_spans(self, tickets)
    }

    /// Copies `bytes` to `buffer` at `offset` (a multiple of 4), before any work submitted later. The last 1-3 bytes of
    /// a length that is no multiple of 4 are padded with zeros. Through wgpu's staging: for loading, not for passes.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) {
        debug_assert!(!self.in_pass.load(Relaxed), "wgpu's staging is not for passes");
        let whole = bytes.len() / 4 * 4;
        if whole > 0 {
            self.queue.write_buffer(&buffer.raw, offset, &bytes[..whole]);
        }
        if whole < bytes.len() {
            let mut last = [0u8; 4];
            last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            self.queue.write_buffer(&buffer.raw, offset + whole as u64, &last);
        }
    }

    /// Waits for all submitted work, then returns the bytes of `slice`.
    pub fn read(&self, slice: super::Slice<'_>) -> Result<Vec<u8>, GpuError> {
        Ok(self.read_many(&[slice])?.pop().expect("one slice in, one out"))
    }

    /// Waits for all submitted work, then returns the bytes of every slice, through one staging buffer.
    pub fn read_many(&self, slices: &[super::Slice<'_>]) -> Result<Vec<Vec<u8>>, GpuError> {
        let total: u64 = slices.iter().map(|s| s.size.next_multiple_of(4)).sum();
        if total == 0 {
            return Ok(slices.iter().map(|_| Vec::new()).collect());
        }
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = self.allocate("read-back staging", total, usage)?;
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for slice in slices {
            let size = slice.size.next_multiple_of(4);
            if size > 0 {
                encoder.copy_buffer_to_buffer(slice.raw, slice.offset, &staging.raw, at, size);
            }
            at += size;
        }
        let mut commands = Some(encoder.finish());
        self.transfer.exclusively(&mut || {
            self.queue.submit(commands.take());
        });
        staging.raw.slice(..).map_async(wgpu::MapMode::Read, |_| {});
        self.wait()?;
        let view = staging.raw.slice(..).get_mapped_range().map_err(|e| GpuError::Lost(e.to_string()))?;
        let mut at = 0;
        let out = slices
            .iter()
            .map(|slice| {
                let bytes = view[at as usize..(at + slice.size) as usize].to_vec();
                at += slice.size.next_multiple_of(4);
                bytes
            })
            .collect();
        Ok(out)
    }

    /// Starts the copies of all [`write`](Self::write)s so far and frees the staging memory of those that have ended.
    pub fn flush(&self) -> Result<(), GpuError> {
        self.transfer.exclusively(&mut || {
            self.queue.submit([]);
        });
        poll(&self.device, wgpu::PollType::Poll, &self.faults)
    }

    /// Waits until everything submitted to wgpu's queue has run.
    pub fn wait(&self) -> Result<(), GpuError> {
        poll(&self.device, wgpu::PollType::wait_indefinitely(), &self.faults)
    }

    /// Frees what ended submissions held, without waiting.
    pub fn reap(&self) -> Result<(), GpuError> {
        poll(&self.device, wgpu::PollType::Poll, &self.faults)
    }

    /// The first fault reported outside of a call, if there was one.
    pub fn check(&self) -> Result<(), GpuError> {
        self.faults.check()
    }
}
