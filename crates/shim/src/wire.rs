//! Protobuf messages of which a few fields are read, by their numbers.

use protobuf::CodedInputStream;

/// The value of a field.
pub enum Value<'a> {
    /// A number.
    Number(u64),
    /// A text, bytes, or a message.
    Bytes(&'a [u8]),
}

/// Gives each field of a message, one after the other, with its number.
///
/// # Errors
/// It is no such message, or those of `each`.
pub fn fields(
    bytes: &[u8],
    mut each: impl FnMut(u32, Value<'_>) -> protobuf::Result<()>,
) -> protobuf::Result<()> {
    const VARINT: u32 = 0; // wire types of the encoding
    const LENGTH: u32 = 2;
    let mut input = CodedInputStream::from_bytes(bytes);
    while !input.eof()? {
        let tag = input.read_raw_varint32()?;
        let number = tag >> 3;
        match tag & 7 {
            VARINT => each(number, Value::Number(input.read_raw_varint64()?))?,
            LENGTH => {
                let value = input.read_bytes()?;
                each(number, Value::Bytes(&value))?;
            }
            1 => drop(input.read_fixed64()?),
            5 => drop(input.read_fixed32()?),
            // Groups, which proto3 has not.
            _ => return Ok(()),
        }
    }
    Ok(())
}

/// A field that is a text.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
