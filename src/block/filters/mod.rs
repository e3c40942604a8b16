//! Filters: drivers between users and a disk, which show the disk as it is.

pub mod copy_before_write;
