//! VK_NV_cooperative_matrix2: matrices that a whole workgroup holds, loaded from memory by the driver. WGSL has no words for them, so kernels
//! that use them are SPIR-V ([`Part::Spirv`](super::Part::Spirv)); and ash 0.38 has none for the extension, so its structures are here.

use std::ffi::{CStr, c_void};

use ash::vk;
use wgpu::hal::api::Vulkan;

pub(super) const EXTENSION: &CStr = c"VK_NV_cooperative_matrix2";

/// `VkPhysicalDeviceCooperativeMatrix2FeaturesNV`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Features {
    s_type: vk::StructureType,
    p_next: *mut c_void,
    workgroup_scope: vk::Bool32,
    flexible_dimensions: vk::Bool32,
    reductions: vk::Bool32,
    conversions: vk::Bool32,
    per_element_operations: vk::Bool32,
    tensor_addressing: vk::Bool32,
    block_loads: vk::Bool32,
}

// SAFETY: it is laid out as the extension says, which lets it extend both.
unsafe impl vk::ExtendsPhysicalDeviceFeatures2 for Features {}
// SAFETY: as above.
unsafe impl vk::ExtendsDeviceCreateInfo for Features {}

impl Features {
    fn none() -> Self {
        let (s_type, p_next, no) = (vk::StructureType::from_raw(1_000_593_000), std::ptr::null_mut(), vk::FALSE);
        Self {
            s_type,
            p_next,
            workgroup_scope: no,
            flexible_dimensions: no,
            reductions: no,
            conversions: no,
            per_element_operations: no,
            tensor_addressing: no,
            block_loads: no,
        }
    }

    /// What the kernels use.
    pub(super) fn needed() -> Self {
        let yes = vk::TRUE;
        Self {
            workgroup_scope: yes,
            flexible_dimensions: yes,
            per_element_operations: yes,
            tensor_addressing: yes,
            block_loads: yes,
            ..Self::none()
        }
    }

    fn has_needed(&self) -> bool {
        [
            self.workgroup_scope,
            self.flexible_dimensions,
            self.per_element_operations,
            self.tensor_addressing,
            self.block_loads,
        ]
        .iter()
        .all(|flag| *flag == vk::TRUE)
    }
}

/// `VkCooperativeMatrixFlexibleDimensionsPropertiesNV`: sizes are multiples of these.
#[repr(C)]
#[derive(Clone, Copy)]
struct Dimensions {
    s_type: vk::StructureType,
    p_next: *mut c_void,
    m: u32,
    n: u32,
    k: u32,
    a: vk::ComponentTypeKHR,
    b: vk::ComponentTypeKHR,
    c: vk::ComponentTypeKHR,
    result: vk::ComponentTypeKHR,
    saturating: vk::Bool32,
    scope: vk::ScopeKHR,
    invocations: u32,
}

/// Matrices of f16 with sums of f32 over a workgroup of 256, as large as `shaders/spirv` has them.
fn fits(dimensions: &Dimensions) -> bool {
    let Dimensions { m, n, k, a, b, c, result, scope, invocations, .. } = *dimensions;
    let (half, single) = (vk::ComponentTypeKHR::FLOAT16, vk::ComponentTypeKHR::FLOAT32);
    (a, b, c, result) == (half, half, single, single)
        && (scope, invocations) == (vk::ScopeKHR::WORKGROUP, 256)
        && [(256, m), (128, n), (64, k)].iter().all(|(size, granularity)| *granularity > 0 && size % granularity == 0)
}

type GetDimensions = unsafe extern "system" fn(vk::PhysicalDevice, *mut u32, *mut Dimensions) -> vk::Result;

/// The adapter has all that the kernels need. Not asked for here: cooperative matrices as WGSL has them.
pub(super) fn are_there(adapter: &wgpu::Adapter) -> bool {
    if !adapter.features().contains(wgpu::Features::PASSTHROUGH_SHADERS) {
        return false;
    }
    // SAFETY: the adapter is alive while its guard is.
    let Some(hal) = (unsafe { adapter.as_hal::<Vulkan>() }) else { return false };
    if !hal.physical_device_capabilities().supports_extension(EXTENSION) {
        return false;
    }
    let shared = hal.shared_instance();
    let (instance, physical) = (shared.raw_instance(), hal.raw_physical_device());
    // SAFETY: handles of this instance; structures live until the calls return; the function is what the extension says it is.
    unsafe {
        let mut features = Features::none();
        let mut addresses = vk::PhysicalDeviceBufferDeviceAddressFeatures::default();
        let mut all = vk::PhysicalDeviceFeatures2::default().push_next(&mut features).push_next(&mut addresses);
        instance.get_physical_device_features2(physical, &mut all);
        if !features.has_needed() || addresses.buffer_device_address != vk::TRUE {
            return false;
        }
        let name = c"vkGetPhysicalDeviceCooperativeMatrixFlexibleDimensionsPropertiesNV";
        let Some(found) = shared.entry().get_instance_proc_addr(instance.handle(), name.as_ptr()) else { return false };
        let get = std::mem::transmute::<unsafe extern "system" fn(), GetDimensions>(found);
        let mut count = 0;
        if get(physical, &mut count, std::ptr::null_mut()) != vk::Result::SUCCESS {
            return false;
        }
        let none = vk::ComponentTypeKHR::default();
        let empty = Dimensions {
            s_type: vk::StructureType::from_raw(1_000_593_001),
            p_next: std::ptr::null_mut(),
            m: 0,
            n: 0,
            k: 0,
            a: none,
            b: none,
            c: none,
            result: none,
            saturating: vk::FALSE,
            scope: vk::ScopeKHR::default(),
            invocations: 0,
        };
        let mut dimensions = vec![empty; count as usize];
        let answer = get(physical, &mut count, dimensions.as_mut_ptr());
        answer == vk::Result::SUCCESS && dimensions.iter().take(count as usize).any(fits)
    }
}
