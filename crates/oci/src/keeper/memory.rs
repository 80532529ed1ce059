//! Memory of a waiting keeper. There is one process per container and it is mostly idle, but the
//! kernel maps code pages around each one that is executed, and they count as the keeper's if no
//! other process has them mapped.
#![allow(unsafe_code)]

use libc::{c_int, c_void, dl_iterate_phdr, dl_phdr_info, size_t};

/// Unmaps code and constants; they are paged in again from the page cache when used.
pub fn release_code() {
    // SAFETY: the callback is called with valid descriptions of loaded objects, only during this
    // call.
    unsafe { dl_iterate_phdr(Some(release), std::ptr::null_mut()) };
}

/// Unmaps the read-only segments of a loaded object.
unsafe extern "C" fn release(info: *mut dl_phdr_info, _size: size_t, _data: *mut c_void) -> c_int {
    let page = rustix::param::page_size();
    // SAFETY: the loader's description of the object is valid, with `dlpi_phnum` headers.
    let (base, headers) = unsafe {
        let info = &*info;
        (
            info.dlpi_addr as usize,
            std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()),
        )
    };
    for header in headers {
        if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
            continue;
        }
        let start = base.wrapping_add(header.p_vaddr as usize);
        let end = start.wrapping_add(header.p_memsz as usize);
        let start = start & !(page - 1);
        // SAFETY: the range is a private file mapping that is never written: a dropped page is read
        // again unchanged. Errors are harmless.
        unsafe {
            libc::madvise(
                start as *mut c_void,
                end.saturating_sub(start),
                libc::MADV_DONTNEED,
            );
        }
    }
    0
}
