use fulmen::units::{ParseBytesError, human_bytes, human_count, parse_bytes};
use proptest::prelude::*;

#[test]
fn bytes_print_with_three_digits() {
    for (bytes, text) in [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (128 << 10, "128 KiB"),
        (10_234, "9.99 KiB"),
        (10_235, "10.0 KiB"), // 9.9951
        ((1 << 20) - 1, "1.00 MiB"),
        (1023 << 10, "1023 KiB"),
        (352_321_536, "336 MiB"),
        (93_405_585_408, "87.0 GiB"),
        (u64::MAX, "16.0 EiB"),
    ] {
        assert_eq!(human_bytes(bytes), text, "{bytes}");
    }
}

#[test]
fn counts_print_with_three_digits() {
    for (count, text) in [
        (0, "0"),
        (999, "999"),
        (1000, "1.00 thousand"),
        (999_499, "999 thousand"),
        (999_500, "1.00 million"),
        (46_702_792_704, "46.7 billion"),
        (u64::MAX, "18.4 quintillion"),
    ] {
        assert_eq!(human_count(count), text, "{count}");
    }
}

#[test]
fn sizes_parse() {
    for (text, bytes) in [
        ("0", 0),
        ("17", 17),
        ("17B", 17),
        ("16GiB", 16 << 30),
        ("16G", 16 << 30),
        (" 16 gib ", 16 << 30),
        ("500MB", 500_000_000),
        ("500M", 500 << 20),
        ("1.5K", 1536),
        (".5k", 512),
        ("2.k", 2048),
        ("0.001KB", 1),
        ("0.0001KB", 0),
        ("1TB", 1_000_000_000_000),
        ("2TiB", 2 << 40),
        ("1.00000000000000000000000000001", 1),
        ("18446744073709551615", u64::MAX),
    ] {
        assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
    }
}

#[test]
fn bad_sizes_say_why() {
    for text in ["", "GiB", ".", "1.2.3", "-1", "+1", "NaN"] {
        assert!(matches!(parse_bytes(text), Err(ParseBytesError::NotANumber { .. })), "{text}");
    }
    for text in ["1 parsec", "1Gb/s", "1e9", "1,5G", "1 2"] {
        assert!(matches!(parse_bytes(text), Err(ParseBytesError::UnknownUnit { .. })), "{text}");
    }
    for text in ["18446744073709551616", "16777216T", "99999999999999999999999999999999999999999999G"] {
        assert!(matches!(parse_bytes(text), Err(ParseBytesError::TooLarge { .. })), "{text}");
    }
    assert_eq!(
        parse_bytes("16Gibs").unwrap_err().to_string(),
        "\"16Gibs\" has unknown unit \"Gibs\": needs B, K, M, G, T (powers of 1024), KiB, MiB, GiB, TiB (the same) or \
         KB, MB, GB, TB (powers of 1000)"
    );
}

proptest! {
    #[test]
    fn any_text_parses_or_is_refused(text in "\\PC*|[0-9]{0,30}[.]?[0-9]{0,30} ?[kKmMgGtTiIbB]{0,4}") {
        let _ = parse_bytes(&text);
    }

    /// Three significant digits: what is printed is within half a percent of what was meant.
    #[test]
    fn printed_bytes_read_back_closely(bytes in any::<u64>(), shift in 24u32..64) {
        let bytes = bytes >> shift; // Below 2^40: parse_bytes knows units up to TiB.
        let back = parse_bytes(&human_bytes(bytes)).unwrap();
        prop_assert!(back.abs_diff(bytes) as f64 <= 0.005 * bytes as f64 + 1.0, "{bytes} {back}");
    }
}
