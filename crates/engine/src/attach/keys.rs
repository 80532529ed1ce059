//! The detach keys in what a user types.

use super::Options;

/// Finds the detach keys in what is typed.
pub struct KeyWatch {
    keys: Vec<u8>,
    /// How many of them were typed last.
    typed: usize,
}

impl KeyWatch {
    /// Keys are looked for only where a user types: on a terminal.
    pub fn new(options: &Options) -> KeyWatch {
        let keys = match options.terminal && options.input {
            true => options.detach_keys.0.clone(),
            false => Vec::new(),
        };
        KeyWatch { keys, typed: 0 }
    }

    /// The bytes to pass on, and whether the keys are complete. The beginning of the keys is held
    /// back until the next key shows that it was none.
    pub fn filter(&mut self, input: &[u8]) -> (Vec<u8>, bool) {
        let mut output = Vec::with_capacity(input.len());
        for byte in input {
            if self.keys.get(self.typed) == Some(byte) {
                self.typed += 1;
                if self.typed == self.keys.len() {
                    return (output, true);
                }
                continue;
            }
            output.append(&mut self.rest());
            if self.keys.first() == Some(byte) {
                self.typed = 1;
            } else {
                output.push(*byte);
            }
        }
        (output, false)
    }

    /// What was held back.
    pub fn rest(&mut self) -> Vec<u8> {
        let rest = self.keys[..self.typed].to_vec();
        self.typed = 0;
        rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::values::DetachKeys;

    fn options() -> Options {
        Options {
            input: true,
            terminal: true,
            shown: [true; 2],
            forward_signals: false,
            detach_keys: DetachKeys(vec![16, 17]),
        }
    }

    #[test]
    fn detach_keys_are_found_and_their_beginning_is_not_lost() {
        let mut keys = KeyWatch::new(&options());
        assert_eq!(keys.filter(b"ab"), (b"ab".to_vec(), false));
        assert_eq!(keys.filter(b"c\x10"), (b"c".to_vec(), false));
        assert_eq!(keys.filter(b"d"), (b"\x10d".to_vec(), false));
        assert_eq!(keys.filter(b"\x10\x10"), (b"\x10".to_vec(), false));
        assert_eq!(keys.filter(b"\x11e"), (Vec::new(), true));
    }

    #[test]
    fn without_terminal_every_byte_passes() {
        let mut keys = KeyWatch::new(&Options {
            terminal: false,
            ..options()
        });
        assert_eq!(keys.filter(b"\x10\x11"), (b"\x10\x11".to_vec(), false));
    }
}
