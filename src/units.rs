//! Byte counts as people write and read them.
//!
//! [`human_bytes`] prints three significant digits in binary units, for tables and messages where a factor matters and
//! the last byte does not. [`parse_bytes`] reads what a user types for a size. Given up: they are no inverse of each
//! other (`human_bytes` rounds), and other locales' decimal commas are not read.

/// Binary units, each 1024 of the one before.
const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// `bytes` with three significant digits and a binary unit: `512 B`, `1.50 KiB`, `84.0 GiB`, `336 MiB`.
pub fn human_bytes(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = 0;
    // 1023.6 KiB would print as 1024 KiB, so what rounds up to the next unit moves there.
    while value >= 1023.5 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}", three_digits(value), UNITS[unit])
}

/// `count` with three significant digits and the scale in words: `995`, `1.05 million`, `46.7 billion`. In words, because
/// a suffix B next to sizes would read as bytes.
pub fn human_count(count: u64) -> String {
    const SCALES: [&str; 7] = ["", "thousand", "million", "billion", "trillion", "quadrillion", "quintillion"];
    if count < 1000 {
        return count.to_string();
    }
    let mut value = count as f64;
    let mut scale = 0;
    while value >= 999.5 && scale + 1 < SCALES.len() {
        value /= 1000.0;
        scale += 1;
    }
    format!("{} {}", three_digits(value), SCALES[scale])
}

/// A value in 0..1024 with three significant digits (four from 1000 on).
fn three_digits(value: f64) -> String {
    // The limits are those below which the shorter form would round to one digit more.
    let decimals = if value < 9.995 {
        2
    } else if value < 99.95 {
        1
    } else {
        0
    };
    format!("{value:.decimals$}")
}

/// A size that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseBytesError {
    #[error("{text:?} is not a size: needs a number, then a unit, such as 16GiB, 1.5G or 500MB")]
    NotANumber { text: String },
    #[error(
        "{text:?} has unknown unit {unit:?}: needs B, K, M, G, T (powers of 1024), KiB, MiB, GiB, TiB (the same) or \
         KB, MB, GB, TB (powers of 1000)"
    )]
    UnknownUnit { text: String, unit: String },
    #[error("{text:?} is more than {} bytes", u64::MAX)]
    TooLarge { text: String },
}

/// Reads a size: a number, perhaps with decimals, then a unit in any case. `K`, `M`, `G`, `T` and `KiB`... are powers of
/// 1024, `KB`, `MB`... powers of 1000; no unit means bytes. Fractions of a byte are dropped. The arithmetic is exact.
pub fn parse_bytes(text: &str) -> Result<u64, ParseBytesError> {
    let trimmed = text.trim();
    let number_end = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(number_end);
    let unit = unit.trim();

    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(ParseBytesError::NotANumber { text: text.to_owned() });
    }
    let (base, power) = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => (1, 0),
        "k" | "kib" => (1024, 1),
        "m" | "mib" => (1024, 2),
        "g" | "gib" => (1024, 3),
        "t" | "tib" => (1024, 4),
        "kb" => (1000, 1),
        "mb" => (1000, 2),
        "gb" => (1000, 3),
        "tb" => (1000, 4),
        _ => return Err(ParseBytesError::UnknownUnit { text: text.to_owned(), unit: unit.to_owned() }),
    };
    let unit_bytes = u128::pow(base, power);

    let too_large = || ParseBytesError::TooLarge { text: text.to_owned() };
    let whole: u64 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_large())? };
    // Digits beyond the eighteenth are below one byte of any unit here.
    let fraction = &fraction[..fraction.len().min(18)];
    let scale = u128::pow(10, fraction.len() as u32);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().map_err(|_| too_large())? };
    let bytes = u128::from(whole) * unit_bytes + fraction * unit_bytes / scale;
    u64::try_from(bytes).map_err(|_| too_large())
}
