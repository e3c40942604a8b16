//! Leaves of the command line: strings into numbers and switches.
//!
//! The forms are those of C's strtol with base 0, as QEMU has them: leading blanks, a sign, `0x`
//! for hexadecimal and a leading `0` for octal.

/// A switch.
pub(super) fn boolean(text: &str) -> Option<bool> {
    match text {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

/// A signed integer.
pub(super) fn int64(text: &str) -> Option<i64> {
    let (negative, magnitude) = integer(text)?;
    if negative {
        0i64.checked_sub_unsigned(magnitude)
    } else {
        i64::try_from(magnitude).ok()
    }
}

/// An unsigned integer; a negative one wraps.
pub(super) fn uint64(text: &str) -> Option<u64> {
    let (negative, magnitude) = integer(text)?;
    Some(if negative {
        magnitude.wrapping_neg()
    } else {
        magnitude
    })
}

/// A finite number.
pub(super) fn number(text: &str) -> Option<f64> {
    let text = text.trim_start();
    // Rust's parser knows words (`inf`, `nan`) that are not finite, and they are refused with them.
    text.parse::<f64>().ok().filter(|number| number.is_finite())
}

/// A size: a number of bytes, or a number with a suffix out of `B K M G T P E` in either case.
///
/// Fractions need a suffix above `B`, hexadecimal takes none; the result is rounded down.
pub(super) fn size(text: &str) -> Option<u64> {
    let text = text.trim_start();
    if text.starts_with("0x") || text.starts_with("0X") {
        return integer(text).map(|(_, magnitude)| magnitude);
    }
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits_end);
    let shift = match suffix {
        "" | "b" | "B" => 0,
        "k" | "K" => 10,
        "m" | "M" => 20,
        "g" | "G" => 30,
        "t" | "T" => 40,
        "p" | "P" => 50,
        "e" | "E" => 60,
        _ => return None,
    };
    let (whole, fraction) = match number.split_once('.') {
        Some((whole, fraction)) => (whole, Some(fraction)),
        None => (number, None),
    };
    let whole: u64 = whole.parse().ok()?;
    let bytes = whole.checked_mul(1 << shift)?;
    match fraction {
        None => Some(bytes),
        Some(_) if shift == 0 => None,
        Some(digits) => bytes.checked_add(fraction_of(digits, shift)?),
    }
}

/// `0.digits * 2^shift`, rounded down.
fn fraction_of(digits: &str, shift: u32) -> Option<u64> {
    // More digits than this cannot change a result of 60 bits.
    const MAX_DIGITS: usize = 18;
    if !digits.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits = &digits[..digits.len().min(MAX_DIGITS)];
    if digits.is_empty() {
        return Some(0);
    }
    let numerator: u128 = digits.parse().ok()?;
    let denominator = 10u128.pow(u32::try_from(digits.len()).ok()?);
    u64::try_from((numerator << shift) / denominator).ok()
}

/// Sign and magnitude.
fn integer(text: &str) -> Option<(bool, u64)> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let lower = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match lower {
        Some(digits) => (digits, 16),
        None if digits.len() > 1 && digits.starts_with('0') => (&digits[1..], 8),
        None => (digits, 10),
    };
    // from_str_radix takes a sign of its own.
    if digits.starts_with(['+', '-']) {
        return None;
    }
    u64::from_str_radix(digits, radix)
        .ok()
        .map(|magnitude| (negative, magnitude))
}
