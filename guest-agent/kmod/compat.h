/* SPDX-License-Identifier: GPL-2.0-only */
/* shareview: what differs between the kernels that it is built for: 5.10, and 6.1 to 6.12. */
#ifndef SHAREVIEW_COMPAT_H
#define SHAREVIEW_COMPAT_H

#include <linux/file.h>
#include <linux/fs.h>
#include <linux/mm.h>
#include <linux/stat.h>
#include <linux/version.h>
#include <linux/xattr.h>

/* Those between were never built; their changes are the same ones, one after the other. */
#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 10, 0) || \
	(LINUX_VERSION_CODE >= KERNEL_VERSION(5, 11, 0) && \
	 LINUX_VERSION_CODE < KERNEL_VERSION(6, 1, 0))
#error "shareview is for Linux 5.10, and for 6.1 and newer"
#endif

#if LINUX_VERSION_CODE < KERNEL_VERSION(5, 11, 0)
/*
 * 5.10: mprotect asks no file system, so that a granted page could become executable, which ends a
 * PVH guest. Mappings are the lower file's own there, always.
 */
#define SV_IDMAP_ARG
#define FMODE_CAN_ODIRECT ((fmode_t)0) /* open looks at f_mapping itself */
#define INVALID_GRANT_HANDLE ((grant_handle_t)-1)
#define kmap_local_page kmap_atomic
#define kunmap_local kunmap_atomic
#define sv_inode_permission inode_permission
#define sv_vfs_getxattr vfs_getxattr

static inline bool is_idmapped_mnt(const struct vfsmount *mnt)
{
	return false; /* since 5.12 */
}

static inline void *alloc_inode_sb(struct super_block *sb, struct kmem_cache *cache, gfp_t gfp)
{
	return kmem_cache_alloc(cache, gfp);
}

/* If this fails, 5.10 gives back the file that it had given us, whatever the mapping has now. */
static inline int sv_mmap_lower(struct file *lower, struct vm_area_struct *vma)
{
	struct file *file = vma->vm_file;
	int err;

	vma->vm_file = get_file(lower);
	err = call_mmap(lower, vma);
	fput(err ? lower : file);
	return err;
}
#else
#define SV_OWN_MAPPINGS
#define SV_IDMAP_ARG struct sv_idmap *idmap,
#define sv_inode_permission(inode, mask) inode_permission(sv_nop_idmap, inode, mask)
#define sv_vfs_getxattr(dentry, name, value, size) \
	vfs_getxattr(sv_nop_idmap, dentry, name, value, size)

static inline int sv_mmap_lower(struct file *lower, struct vm_area_struct *vma)
{
	vma_set_file(vma, lower);
	return call_mmap(lower, vma);
}
#endif

/* 6.3: mounts' idmaps have their own type; flags of a mapping are set by a function; filelock.h */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 3, 0)
#include <linux/filelock.h>
#define sv_idmap mnt_idmap
#define sv_nop_idmap (&nop_mnt_idmap)
#else
#define sv_idmap user_namespace
#define sv_nop_idmap (&init_user_ns)
static inline void vm_flags_set(struct vm_area_struct *vma, vm_flags_t flags)
{
	vma->vm_flags |= flags;
}
#endif

/* 6.4: a fault may hold the lock of its mapping only, which mprotect takes too late for us. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 4, 0)
#define sv_lock_mapping vma_start_write
#else
static inline void sv_lock_mapping(struct vm_area_struct *vma)
{
	lockdep_assert_held_write(&vma->vm_mm->mmap_lock);
}
#endif

/* 6.5: splicing by copy; before, the pipe's iterator is told to copy by what read_iter calls. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 5, 0)
#define sv_splice_read copy_splice_read
#else
#define sv_splice_read generic_file_splice_read
#endif

/* 6.6: the list of xattr handlers is constant. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 6, 0)
#define SV_XATTR_LIST const struct xattr_handler *const
#else
#define SV_XATTR_LIST const struct xattr_handler *
#endif

/* 6.7: a file system above us may ask without security hooks, and must be answered so. */
static inline int sv_getattr(const struct path *path, struct kstat *stat, u32 mask,
			     unsigned int flags)
{
#ifdef AT_GETATTR_NOSEC
	if (flags & AT_GETATTR_NOSEC)
		return vfs_getattr_nosec(path, stat, mask, flags);
#endif
	return vfs_getattr(path, stat, mask, flags);
}

/* 6.9: leases are no longer locks. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 9, 0)
#define sv_lease file_lease
#define sv_lease_alloc locks_alloc_lease
#define sv_lease_free locks_free_lease
static inline void sv_lease_init(struct sv_lease *lease, struct file *file, void *owner)
{
	locks_init_lease(lease);
	lease->c.flc_flags = FL_LEASE;
	lease->c.flc_type = F_RDLCK;
	lease->c.flc_owner = owner;
	lease->c.flc_pid = current->tgid;
	lease->c.flc_file = file;
}

static inline void *sv_lease_owner(const struct sv_lease *lease)
{
	return lease->c.flc_owner;
}
#else
#define sv_lease file_lock
#define lease_manager_operations lock_manager_operations
#define sv_lease_alloc locks_alloc_lock
#define sv_lease_free locks_free_lock
static inline void sv_lease_init(struct sv_lease *lease, struct file *file, void *owner)
{
	locks_init_lock(lease);
	lease->fl_flags = FL_LEASE;
	lease->fl_type = F_RDLCK;
	lease->fl_end = OFFSET_MAX;
	lease->fl_owner = owner;
	lease->fl_pid = current->tgid;
	lease->fl_file = file;
}

static inline void *sv_lease_owner(const struct sv_lease *lease)
{
	return lease->fl_owner;
}
#endif

/* 6.12: what a struct fd holds is asked for by a macro. */
#if LINUX_VERSION_CODE >= KERNEL_VERSION(6, 12, 0)
#define sv_fd_file(fd) fd_file(fd)
#else
#define sv_fd_file(fd) ((fd).file)
#endif

#endif
