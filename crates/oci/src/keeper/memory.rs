//! What a keeper that waits holds of memory. It is one process for each container and does nothing
//! for most of its life, but the kernel maps pages of code around each that is executed, and they
//! count as its own where no other process has them.
#![allow(unsafe_code)]

use libc::{c_int, c_void, dl_iterate_phdr, dl_phdr_info, size_t};

/// Unmaps code and constants: what is executed next comes back from the page cache.
pub fn release_code() {
    // SAFETY: the function is called with valid descriptions of what is loaded, during this call
    // only.
    unsafe { dl_iterate_phdr(Some(release), std::ptr::null_mut()) };
}

/// Unmaps what is never written of one loaded object.
unsafe extern "C" fn release(info: *mut dl_phdr_info, _size: size_t, _data: *mut c_void) -> c_int {
    let page = rustix::param::page_size();
    // SAFETY: the loader describes an object, with as many headers as it says.
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
        // SAFETY: the range is mapped from a file, privately and never written: a page that is
        // dropped comes back as it was. Error changes nothing.
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
