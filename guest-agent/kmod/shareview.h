/* SPDX-License-Identifier: GPL-2.0-only WITH Linux-syscall-note */
/*
 * shareview: the control interface, version 2.
 *
 * /dev/shareview takes these ioctls from holders of CAP_SYS_ADMIN. A file is named by an open
 * descriptor of it in a mounted view. Every structure begins with its own size; another size than
 * the one below is refused with EINVAL, and so is a reserved field or a flag that is not zero.
 *
 * poll() on the device says POLLIN when something was let go that nobody had asked for (a writer, a
 * suspend, an unmount), or that a suspend was refused, since this descriptor's last SHAREVIEW_INFO.
 */
#ifndef SHAREVIEW_H
#define SHAREVIEW_H

#include <linux/ioctl.h>
#include <linux/types.h>

#define SHAREVIEW_VERSION 2
#define SHAREVIEW_MAX_RUNS 0x100000U
/* A file's pages from this one on cannot be attached: 16 GiB. */
#define SHAREVIEW_MAX_PAGE 0x400000U

/* Pages [page, page + count) of a file are the granted pages of [ref, ref + count). */
struct shareview_run {
	__u32 page;
	__u32 ref;
	__u32 count;
};

/*
 * Attach granted pages to a file, all of them or none.
 *
 * Errors: EPERM; EINVAL (an argument is out of its bounds, runs overlap or do not ascend, a
 * reference cannot be mapped, the kernel has leases switched off); EBADF (not a descriptor of a
 * file in a view); EFAULT; EEXIST (has a table already); ESTALE (another epoch than ours: the
 * references are from before a suspend); EAGAIN (the file is open for writing, or was just opened
 * for it); EBADMSG (a page differs from the file's); ENOSPC (max_pages); ENOMEM; EINTR.
 */
struct shareview_attach {
	__u32 size;
	__s32 fd;
	__u32 flags;		/* 0 */
	__u32 domid;		/* who granted */
	__u32 runs_count;	/* 1 .. SHAREVIEW_MAX_RUNS */
	__u32 reserved;		/* 0 */
	__aligned_u64 runs;	/* address of runs_count shareview_run, pages ascending */
	__aligned_u64 epoch;	/* of SHAREVIEW_INFO, from before the references were asked for */
	__aligned_u64 compared;	/* out: pages that were compared with the file */
};

/* A file's table; all zero without one. */
struct shareview_state {
	__u32 size;
	__s32 fd;
	__aligned_u64 attached_pages;
	__aligned_u64 file_pages;
};

/*
 * Let go of a file's table; ENOENT: there is none. fd -1: of all files of all views, no error if
 * none.
 */
struct shareview_detach {
	__u32 size;
	__s32 fd;
};

struct shareview_info {
	__u32 size;
	__u32 version;		/* out: SHAREVIEW_VERSION */
	__aligned_u64 epoch;	/* suspends so far; references do not survive one */
	__aligned_u64 lost;	/* tables let go without an ioctl: writer, suspend, unmount */
	__aligned_u64 refused;	/* suspends, because somebody held them back */
	__aligned_u64 tables;	/* attached now */
	__aligned_u64 attached_pages;
	__aligned_u64 pending_pages; /* let go, not yet given back: still pinned by somebody */
	__aligned_u64 leaked_pages; /* that Xen would not unmap: never used again */
	__aligned_u64 read_bytes; /* by read() from granted pages */
	__aligned_u64 faults;	/* served from granted pages */
	__aligned_u64 lower_faults; /* served from the plain file */
};

/*
 * 1: this descriptor's holder has what would not survive a suspend: grants that are mapped by
 * itself (gntdev), event channels that are bound (evtchn). A suspend fails with EBUSY until it says
 * 0, or closes the descriptor. It may then have the guest suspended after all, by writing "suspend"
 * to its control/shutdown in xenstore, as long as the toolstack waits for it.
 */
struct shareview_hold {
	__u32 size;
	__u32 hold;
};

#define SHAREVIEW_INFO _IOWR('x', 0xa0, struct shareview_info)
#define SHAREVIEW_ATTACH _IOWR('x', 0xa1, struct shareview_attach)
#define SHAREVIEW_DETACH _IOW('x', 0xa2, struct shareview_detach)
#define SHAREVIEW_STATE _IOWR('x', 0xa3, struct shareview_state)
#define SHAREVIEW_HOLD _IOW('x', 0xa4, struct shareview_hold)

#endif
