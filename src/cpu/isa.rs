//! The instruction sets that the CPU lane has code for, and which of them this machine runs.

use std::fmt;

/// Instruction set the attention runs on. The field is private: only [`Isa::available`] fills it, after asking the CPU,
/// so holding a value is the proof that its instructions exist here.
///
/// Levels round differently: a policy planned on one is not valid on another, so the hardware profile records the name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Level);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Level {
    Portable,
    /// AVX2, FMA and F16C: x86-64 servers and desktops from 2013 (Intel) and 2015 (AMD) on.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 and AVX-VNNI: desktops from 2021 (Intel) and 2024 (AMD) on.
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni,
    /// AVX-512F and BW: all but the very first CPUs with AVX-512.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with VNNI: servers from 2019 (Intel) and 2022 (AMD) on.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
    /// Every 64-bit Arm has it. Run under emulation only: right, of unknown speed.
    #[cfg(target_arch = "aarch64")]
    Neon,
}

/// A name that is no level of this machine: misspelt, or from a profile of another machine.
#[derive(Debug, thiserror::Error)]
#[error("this machine does not run instruction set `{name}`; it runs {}", names(available))]
pub struct UnknownIsa {
    pub name: String,
    pub available: Vec<Isa>,
}

impl Isa {
    /// Every level this machine runs, slowest first.
    pub fn available() -> Vec<Isa> {
        let mut levels = vec![Isa(Level::Portable)];
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 =
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
            if avx2 {
                levels.push(Isa(Level::Avx2));
            }
            if avx2 && is_x86_feature_detected!("avxvnni") {
                levels.push(Isa(Level::Avx2Vnni));
            }
            if avx2 && is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw") {
                levels.push(Isa(Level::Avx512));
                if is_x86_feature_detected!("avx512vnni") {
                    levels.push(Isa(Level::Avx512Vnni));
                }
            }
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            levels.push(Isa(Level::Neon));
        }
        levels
    }

    /// The fastest level of this machine.
    pub fn best() -> Isa {
        *Self::available().last().expect("the portable level is always there")
    }

    /// The level of a profile or a flag, if this machine runs it.
    pub fn from_name(name: &str) -> Result<Isa, UnknownIsa> {
        let available = Self::available();
        let found = available.iter().copied().find(|isa| isa.name() == name);
        found.ok_or_else(|| UnknownIsa { name: name.to_owned(), available })
    }

    /// The name in profiles and flags.
    pub fn name(self) -> &'static str {
        match self.0 {
            Level::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni => "avx2vnni",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => "avx512vnni",
            #[cfg(target_arch = "aarch64")]
            Level::Neon => "neon",
        }
    }

    pub(super) fn level(self) -> Level {
        self.0
    }
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Isa({})", self.name())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn names(levels: &[Isa]) -> String {
    levels.iter().map(|isa| isa.name()).collect::<Vec<_>>().join(", ")
}
