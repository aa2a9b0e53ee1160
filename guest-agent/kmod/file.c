// SPDX-License-Identifier: GPL-2.0-only
/*
 * shareview: open, read and map.
 *
 * An open file here has an open file of the lower file system (private_data) and its address space
 * (f_mapping). So mappings made here hang in the lower file's tree of mappings: truncation and
 * reclaim find them, and one unmap_mapping_range reaches all of them, whenever they were made.
 */
#include <linux/fadvise.h>
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/magic.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/uio.h>
#include <xen/xen.h>

#include "internal.h"

static bool sv_has_table(struct file *file)
{
	return rcu_access_pointer(sv_inode(file_inode(file))->table);
}

/* ------------------------------------------------------------------------------ open and close */

static int sv_open(struct inode *inode, struct file *file)
{
	const int once = O_CREAT | O_EXCL | O_NOCTTY | O_TRUNC;
	struct file *lower;
	struct path path;

	/* Not f_path: overlayfs opens what is below it under its own name (6.1). */
	sv_lower_path(file_dentry(file), &path);
	lower = dentry_open(&path, file->f_flags & ~once, current_cred());
	if (IS_ERR(lower))
		return PTR_ERR(lower);
	file->private_data = lower;
	if (S_ISREG(inode->i_mode)) {
		file->f_mapping = lower->f_mapping;
		file->f_mode |= lower->f_mode & FMODE_CAN_ODIRECT;
	}
	return 0;
}

static int sv_release(struct inode *inode, struct file *file)
{
	fput(file->private_data);
	return 0;
}

/* ---------------------------------------------------------------------------------------- read */

/*
 * The granted page at a place of a file, with a reference, or NULL; then *ret_until is where the
 * next granted page begins. The reference keeps the page mapped: the caller may copy as slowly as
 * it likes (the reader's memory may be somebody's trap), and no detach waits for it.
 */
static struct page *sv_get_page(struct file *file, unsigned long page, loff_t *ret_until)
{
	struct sv_table *table;
	struct page *found;
	unsigned long next;
	int idx;

	idx = srcu_read_lock(&sv_srcu);
	table = srcu_dereference(sv_inode(file_inode(file))->table, &sv_srcu);
	found = sv_table_page(table, page);
	if (found) {
		get_page(found);
	} else {
		*ret_until = LLONG_MAX;
		for (next = page + 1; table && next < table->span; next++) {
			if (table->by_page[next]) {
				*ret_until = (loff_t)next << PAGE_SHIFT;
				break;
			}
		}
	}
	srcu_read_unlock(&sv_srcu, idx);
	return found;
}

/* Copied, not handed over, also to a pipe: a granted page must not reach a device's driver. */
static ssize_t sv_copy(struct page *page, loff_t size, struct kiocb *iocb, struct iov_iter *to)
{
	size_t offset = offset_in_page(iocb->ki_pos);
	size_t wanted = min_t(loff_t, PAGE_SIZE - offset, size - iocb->ki_pos);
	size_t done;

	wanted = min(wanted, iov_iter_count(to));
	done = copy_to_iter(page_address(page) + offset, wanted, to);
	iocb->ki_pos += done;
	this_cpu_add(sv_counters->read_bytes, done);
	return done;
}

static ssize_t sv_read_lower(struct file *lower, loff_t until, struct kiocb *iocb,
			     struct iov_iter *to)
{
	size_t count = iov_iter_count(to);
	size_t part = min_t(loff_t, count, until - iocb->ki_pos);
	ssize_t done;

	iov_iter_truncate(to, part);
	done = vfs_iter_read(lower, to, &iocb->ki_pos, 0);
	iov_iter_reexpand(to, iov_iter_count(to) + count - part);
	return done;
}

static ssize_t sv_read_iter(struct kiocb *iocb, struct iov_iter *to)
{
	struct file *file = iocb->ki_filp;
	struct file *lower = file->private_data;
	ssize_t total = 0, done = 0;

	if (!sv_has_table(file))
		return vfs_iter_read(lower, to, &iocb->ki_pos, 0);
	while (iov_iter_count(to)) {
		loff_t size = i_size_read(file_inode(lower));
		loff_t until = 0;
		struct page *page;

		if (iocb->ki_pos >= size)
			break;
		page = sv_get_page(file, iocb->ki_pos >> PAGE_SHIFT, &until);
		if (page) {
			done = sv_copy(page, size, iocb, to);
			put_page(page);
			if (!done)
				done = -EFAULT;
		} else {
			done = sv_read_lower(lower, until, iocb, to);
		}
		if (done <= 0)
			break;
		total += done;
		if (fatal_signal_pending(current))
			break;
		cond_resched();
	}
	return total ? total : done;
}

static loff_t sv_llseek(struct file *file, loff_t offset, int whence)
{
	struct file *lower = file->private_data;
	loff_t size = i_size_read(file_inode(lower));
	loff_t max = file_inode(file)->i_sb->s_maxbytes;

	if (whence == SEEK_DATA || whence == SEEK_HOLE) {
		offset = vfs_llseek(lower, offset, whence);
		return offset < 0 ? offset : vfs_setpos(file, offset, max);
	}
	return generic_file_llseek_size(file, offset, whence, max, size);
}

/* With granted pages there is little to read ahead; whatever the lower file has may always go. */
static int sv_fadvise(struct file *file, loff_t offset, loff_t len, int advice)
{
	if (advice == POSIX_FADV_WILLNEED && sv_has_table(file))
		return 0;
	return vfs_fadvise(file->private_data, offset, len, advice);
}

/* ----------------------------------------------------------------------------------------- map */

#ifdef SV_OWN_MAPPINGS
/* Granted pages that one fault maps at most; the kernel's own number for cached pages. */
#define SV_FAULT_AROUND 16UL

static unsigned long sv_file_pages(struct file *file)
{
	return DIV_ROUND_UP(i_size_read(file->f_mapping->host), PAGE_SIZE);
}

/* Map a granted page, and its neighbours as far as they are attached. Under sv_srcu. */
static vm_fault_t sv_map_granted(struct vm_fault *vmf, struct sv_table *table)
{
	struct vm_area_struct *vma = vmf->vma;
	unsigned long first = vmf->pgoff, last = vmf->pgoff;
	unsigned long start = max(round_down(first, SV_FAULT_AROUND), vma->vm_pgoff);
	unsigned long end = min(start + SV_FAULT_AROUND, vma->vm_pgoff + vma_pages(vma));
	unsigned long count;
	int err;

	end = min(end, sv_file_pages(vma->vm_file));
	while (first > start && sv_table_page(table, first - 1))
		first--;
	while (last + 1 < end && sv_table_page(table, last + 1))
		last++;
	count = last - first + 1;
	if (count > 1) {
		err = vm_insert_pages(vma, vma->vm_start + ((first - vma->vm_pgoff) << PAGE_SHIFT),
				      table->by_page + first, &count);
		if (!err)
			return VM_FAULT_NOPAGE;
	}
	/*
	 * One of them was mapped already, or there is little memory: at least the one that is
	 * needed.
	 */
	return vmf_insert_page(vma, vmf->address & PAGE_MASK, table->by_page[vmf->pgoff]);
}

static vm_fault_t sv_fault(struct vm_fault *vmf)
{
	struct vm_area_struct *vma = vmf->vma;
	struct file *file = vma->vm_file;
	vm_fault_t ret = VM_FAULT_ERROR;
	struct sv_table *table;
	struct page *page;
	int idx;

	/*
	 * Executing a grant ends a PVH guest. What is executable, or ever becomes so, is the
	 * file's.
	 */
	if (!(vma->vm_flags & VM_EXEC) && sv_has_table(file)) {
		idx = srcu_read_lock(&sv_srcu);
		table = srcu_dereference(sv_inode(file_inode(file))->table, &sv_srcu);
		page = sv_table_page(table, vmf->pgoff);
		if (page && vmf->pgoff < sv_file_pages(file)) {
			if (vmf->flags & FAULT_FLAG_WRITE) {
				/*
				 * A private copy is to be made: our caller copies, and drops
				 * this.
				 */
				get_page(page);
				vmf->page = page;
				ret = 0;
			} else {
				ret = sv_map_granted(vmf, table);
			}
		}
		srcu_read_unlock(&sv_srcu, idx);
		if (ret != VM_FAULT_ERROR) {
			this_cpu_inc(sv_counters->faults);
			return ret;
		}
	}
	this_cpu_inc(sv_counters->lower_faults);
	return filemap_fault(vmf);
}

/* Cached pages of the lower file around a fault, but not where granted pages are. */
static vm_fault_t sv_map_pages(struct vm_fault *vmf, pgoff_t start, pgoff_t end)
{
	struct vm_area_struct *vma = vmf->vma;
	struct sv_table *table;
	pgoff_t first = vmf->pgoff, last = vmf->pgoff;
	bool granted;
	int idx;

	if (!(vma->vm_flags & VM_EXEC) && sv_has_table(vma->vm_file)) {
		idx = srcu_read_lock(&sv_srcu);
		table = srcu_dereference(sv_inode(file_inode(vma->vm_file))->table, &sv_srcu);
		granted = sv_table_page(table, vmf->pgoff);
		while (!granted && first > start && !sv_table_page(table, first - 1))
			first--;
		while (!granted && last < end && !sv_table_page(table, last + 1))
			last++;
		srcu_read_unlock(&sv_srcu, idx);
		if (granted)
			return 0;
		start = first;
		end = last;
	}
	return filemap_map_pages(vmf, start, end);
}

/*
 * Before a mapping becomes executable, granted pages go from it; faults will find the lower
 * file's.
 */
static int sv_mprotect(struct vm_area_struct *vma, unsigned long start, unsigned long end,
		       unsigned long flags)
{
	loff_t offset = ((loff_t)vma->vm_pgoff << PAGE_SHIFT) + (start - vma->vm_start);

	if ((flags & VM_EXEC) && !(vma->vm_flags & VM_EXEC)) {
		/* No fault may put one back before the flags have changed. */
		sv_lock_mapping(vma);
		unmap_mapping_range(vma->vm_file->f_mapping, offset, end - start, 0);
	}
	return 0;
}

static const struct vm_operations_struct sv_vm_operations = {
	.fault = sv_fault,
	.map_pages = sv_map_pages,
	.mprotect = sv_mprotect,
};

/*
 * Whether a mapping is ours, so that granted pages can come and go under it. Not if it is
 * executable; not in a PV guest, where granted pages cannot be given to user space like this; and
 * only where the lower file system's own faults are filemap_fault and nothing more, because ours
 * are then.
 */
static bool sv_may_own(struct file *lower, const struct vm_area_struct *vma)
{
	const struct inode *inode = lower->f_mapping->host;

	return !(vma->vm_flags & VM_EXEC) && !xen_pv_domain() &&
	       inode->i_sb->s_magic == EXT4_SUPER_MAGIC && !IS_DAX(inode);
}

static bool sv_own(struct file *lower, struct vm_area_struct *vma)
{
	if (!sv_may_own(lower, vma))
		return false;
	vma->vm_ops = &sv_vm_operations;
	/* Pages of the file and pages that are none of any file. */
	vm_flags_set(vma, VM_MIXEDMAP);
	return true;
}
#else
static bool sv_own(struct file *lower, struct vm_area_struct *vma)
{
	return false;
}
#endif

static int sv_mmap(struct file *file, struct vm_area_struct *vma)
{
	struct file *lower = file->private_data;

	if (sv_own(lower, vma))
		return 0;
	return lower->f_op->mmap ? sv_mmap_lower(lower, vma) : -ENODEV;
}

const struct file_operations sv_file_operations = {
	.owner = THIS_MODULE,
	.open = sv_open,
	.release = sv_release,
	.llseek = sv_llseek,
	.read_iter = sv_read_iter,
	.splice_read = sv_splice_read,
	.mmap = sv_mmap,
	.fadvise = sv_fadvise,
	.fsync = noop_fsync,
	/* A lease here would not see who writes to the lower file. */
	.setlease = simple_nosetlease,
};

/* -------------------------------------------------------------------------------- directories */

static int sv_iterate(struct file *file, struct dir_context *context)
{
	struct file *lower = file->private_data;
	int err;

	lower->f_pos = context->pos;
	err = iterate_dir(lower, context);
	file->f_pos = lower->f_pos;
	return err;
}

static loff_t sv_dir_llseek(struct file *file, loff_t offset, int whence)
{
	loff_t place = vfs_llseek(file->private_data, offset, whence);

	if (place >= 0)
		file->f_pos = place;
	return place;
}

const struct file_operations sv_dir_operations = {
	.owner = THIS_MODULE,
	.open = sv_open,
	.release = sv_release,
	.read = generic_read_dir,
	.iterate_shared = sv_iterate,
	.llseek = sv_dir_llseek,
	.fsync = noop_fsync,
	.setlease = simple_nosetlease,
};
