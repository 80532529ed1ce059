//! A table whose entries keep their number until they are removed.

/// Values by number. Numbers of removed values are reused.
pub struct Slab<T> {
    entries: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slab<T> {
    pub fn new() -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
        }
    }

    /// A table of values with their numbers, which must ascend and be below `limit`.
    pub fn from_entries(entries: impl IntoIterator<Item = (u32, T)>, limit: usize) -> Option<Self> {
        let mut slab = Self::new();
        for (index, value) in entries {
            let index_usize = usize::try_from(index).ok()?;
            if index_usize < slab.entries.len() || index_usize >= limit {
                return None;
            }
            for free in slab.entries.len()..index_usize {
                // Below `index`, which is a `u32`.
                slab.free.push(free as u32);
                slab.entries.push(None);
            }
            slab.entries.push(Some(value));
        }
        Some(slab)
    }

    /// All values with their numbers, ascending.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        (0..)
            .zip(&self.entries)
            .filter_map(|(index, entry)| Some((index, entry.as_ref()?)))
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    /// Adds a value, unless there are `limit` already.
    pub fn insert(&mut self, value: T, limit: usize) -> Option<u32> {
        if self.len() >= limit {
            return None;
        }
        if let Some(index) = self.free.pop() {
            self.entries[index as usize] = Some(value);
            return Some(index);
        }
        let index = u32::try_from(self.entries.len()).ok()?;
        self.entries.push(Some(value));
        Some(index)
    }

    pub fn get(&self, index: u32) -> Option<&T> {
        self.entries.get(index as usize)?.as_ref()
    }

    pub fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.entries.get_mut(index as usize)?.as_mut()
    }

    pub fn remove(&mut self, index: u32) -> Option<T> {
        let value = self.entries.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(value)
    }

    /// All values.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut().flatten()
    }

    /// Keeps only the values for which `keep` is true.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        for (index, entry) in self.entries.iter_mut().enumerate() {
            if entry.as_ref().is_some_and(|value| !keep(value)) {
                *entry = None;
                // The table never grows beyond 32 bits of entries.
                self.free.push(index as u32);
            }
        }
    }
}
