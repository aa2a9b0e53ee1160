// SPDX-License-Identifier: GPL-2.0-only
/*
 * shareview: tables of granted pages attached to files.
 *
 * The life of a table: all its grants are mapped; a read lease is taken on the lower file, from
 * where on nobody has it open for writing and whoever wants to waits; the pages are compared with
 * the lower file's; the table is published (sv_inode.table). It ends by an ioctl, a writer, an
 * unmount or a suspend: the table is taken back, faults in progress are waited for (sv_srcu), all
 * mappings of the file are emptied, the lease goes (the writer goes on here). The grants are
 * unmapped when nobody has a reference to any of the pages any more; nothing waits for that but a
 * suspend, two seconds.
 *
 * Locks: sv_all_lock (unmount, suspend) > sv_inode.lock (who changes sv_inode.table) >
 * sv_tables_lock (the list). sv_inode.lock is never held while another context is waited for. A
 * table holds its inode; while sv_super.tables is not zero the super block is not taken down.
 */
#include <linux/cred.h>
#include <linux/file.h>
#include <linux/highmem.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/pagemap.h>
#include <linux/slab.h>
#include <linux/string.h>
#include <linux/sched/task.h>
#include <linux/wait_bit.h>

#include "internal.h"

#define SV_BATCH 1024U		/* grants in one call */
#define SV_SUSPEND_MS 2000	/* for pinned pages to be let go before a suspend is refused */

static unsigned long max_pages = 1UL << 20;
module_param(max_pages, ulong, 0644);
MODULE_PARM_DESC(max_pages, "granted pages that may be attached at once, in all files");

DEFINE_SRCU(sv_srcu);
struct sv_counters __percpu *sv_counters;

static DEFINE_MUTEX(sv_all_lock);
static DEFINE_SPINLOCK(sv_tables_lock);
static LIST_HEAD(sv_tables);
static struct workqueue_struct *sv_queue;
static struct cred *sv_kernel_cred;

static atomic_long_t sv_used;	 /* pages of all tables, from the attempt to attach to the unmap */
static atomic_long_t sv_pending; /* of them, let go of and not unmapped yet */
static atomic_long_t sv_attached;
static atomic_long_t sv_leaked;
static atomic_long_t sv_count;
static atomic64_t sv_lost;
static atomic64_t sv_refused;
static atomic64_t sv_epoch;

/* -------------------------------------------------------------------------------------- grants */

static void sv_table_free(struct sv_table *table)
{
	if (!table)
		return;
	if (table->pages && table->pages[0])
		gnttab_free_pages(table->count, table->pages);
	kvfree(table->by_page);
	kvfree(table->pages);
	kvfree(table->unmap);
	atomic_long_sub(table->count, &sv_used);
	kfree(table);
}

/*
 * Unmap what is mapped of some pages. What Xen will not unmap stays a foreign frame in our memory
 * map: such a page must never be used again. Return how many those are.
 */
static unsigned int sv_unmap(struct sv_table *table, unsigned int first, unsigned int count)
{
	unsigned int at = first, end = first + count, bad = 0, i, part;
	int err;

	while (at < end) {
		if (table->unmap[at].handle == INVALID_GRANT_HANDLE) {
			at++;
			continue;
		}
		for (part = 1; part < SV_BATCH && at + part < end; part++)
			if (table->unmap[at + part].handle == INVALID_GRANT_HANDLE)
				break;
		err = gnttab_unmap_refs(table->unmap + at, NULL, table->pages + at, part);
		for (i = at; i < at + part; i++)
			if (err || table->unmap[i].status != GNTST_okay)
				bad++;
		at += part;
		cond_resched();
	}
	return bad;
}

static void sv_unmap_and_free(struct sv_table *table)
{
	unsigned int count = table->count;
	unsigned int bad = sv_unmap(table, 0, count);

	if (bad) {
		pr_err("Xen did not unmap %u of %u pages, which are lost\n", bad, count);
		atomic_long_add(count, &sv_leaked);
		table->pages[0] = NULL; /* so that none of them is given back */
	}
	sv_table_free(table);
}

/*
 * Unmap a table's grants once nobody has a reference to any of its pages but us; else look again.
 */
static void sv_unmap_work(struct work_struct *work)
{
	struct sv_table *table = container_of(work, struct sv_table, unmap_work.work);
	unsigned int count = table->count;
	unsigned int i;

	/*
	 * No page gets its first reference any more: there is no table and no mapping to find it
	 * in.
	 */
	for (i = 0; i < count; i++) {
		if (page_count(table->pages[i]) > 1) {
			queue_delayed_work(sv_queue, &table->unmap_work,
					   msecs_to_jiffies(1U << min(table->tries++, 9U)));
			return;
		}
	}
	sv_unmap_and_free(table);
	atomic_long_sub_return(count, &sv_pending); /* with a barrier, for the wakeup */
	wake_up_var(&sv_pending);
	module_put(THIS_MODULE); /* sv_queue is drained before the module goes */
}

/* Map all grants of the runs, or none. */
static int sv_map(struct sv_table *table, u32 domid, const struct shareview_run *runs)
{
	const u32 flags = GNTMAP_host_map | GNTMAP_readonly;
	struct gnttab_map_grant_ref *map;
	unsigned int done = 0, part, i, page_of_run = 0, run = 0, bad;
	unsigned long address;
	int err = 0;

	map = kvcalloc(min(table->count, SV_BATCH), sizeof(*map), GFP_KERNEL);
	if (!map)
		return -ENOMEM;
	while (done < table->count && !err) {
		part = min(table->count - done, SV_BATCH);
		for (i = 0; i < part; i++) {
			address = (unsigned long)page_address(table->pages[done + i]);
			gnttab_set_map_op(&map[i], address, flags,
					  runs[run].ref + page_of_run, domid);
			map[i].status = GNTST_general_error; /* until Xen says something else */
			gnttab_set_unmap_op(&table->unmap[done + i], address, flags,
					    INVALID_GRANT_HANDLE);
			table->by_page[runs[run].page + page_of_run] = table->pages[done + i];
			if (++page_of_run == runs[run].count) {
				page_of_run = 0;
				run++;
			}
		}
		err = gnttab_map_refs(map, NULL, table->pages + done, part);
		for (i = 0; i < part; i++) {
			if (map[i].status == GNTST_okay)
				table->unmap[done + i].handle = map[i].handle;
			else
				err = err ? err : -EINVAL;
		}
		done += part;
		if (fatal_signal_pending(current))
			err = -EINTR;
		cond_resched();
	}
	kvfree(map);
	if (err) {
		bad = sv_unmap(table, 0, done);
		if (bad) {
			pr_err("Xen did not unmap %u pages, which are lost\n", bad);
			atomic_long_add(table->count, &sv_leaked);
			table->pages[0] = NULL;
		}
	}
	return err;
}

/* Make a table with all its grants mapped, which nobody knows yet. */
static int sv_table_create(const struct shareview_attach *args, const struct shareview_run *runs,
			   unsigned int count, struct sv_table **ret)
{
	const struct shareview_run *last = &runs[args->runs_count - 1];
	struct sv_table *table = kzalloc(sizeof(*table), GFP_KERNEL);
	int err = -ENOMEM;

	if (!table)
		return err;
	table->span = last->page + last->count;
	table->count = count;
	if (atomic_long_add_return(count, &sv_used) > READ_ONCE(max_pages)) {
		sv_table_free(table);
		return -ENOSPC;
	}
	table->by_page = kvcalloc(table->span, sizeof(*table->by_page), GFP_KERNEL_ACCOUNT);
	table->pages = kvcalloc(count, sizeof(*table->pages), GFP_KERNEL_ACCOUNT);
	table->unmap = kvcalloc(count, sizeof(*table->unmap), GFP_KERNEL_ACCOUNT);
	if (table->by_page && table->pages && table->unmap) {
		err = gnttab_alloc_pages(count, table->pages);
		if (err)
			table->pages[0] = NULL; /* it has freed what it had */
		else
			err = sv_map(table, args->domid, runs);
	}
	if (err) {
		sv_table_free(table);
		return err;
	}
	*ret = table;
	return 0;
}

/* --------------------------------------------------------------------------------------- lease */

/*
 * Called with the lease's spin lock held: somebody opens the lower file for writing, or truncates
 * it.
 */
static bool sv_lease_break(struct sv_lease *lease)
{
	struct sv_table *table = sv_lease_owner(lease);

	if (!test_and_set_bit(0, &table->broken))
		queue_work(sv_queue, &table->broken_work);
	return false; /* the writer waits until the lease is gone */
}

static const struct lease_manager_operations sv_lease_operations = {
	.lm_break = sv_lease_break,
	.lm_change = lease_modify,
};

/* -EAGAIN: the file is open for writing. */
static int sv_lease_take(struct sv_table *table)
{
	struct sv_lease *lease = sv_lease_alloc();
	const struct cred *callers;
	int err;

	if (!lease)
		return -ENOMEM;
	sv_lease_init(lease, table->lower, table);
	lease->fl_lmops = &sv_lease_operations;
	callers = override_creds(sv_kernel_cred);
	err = vfs_setlease(table->lower, F_RDLCK, &lease, NULL);
	revert_creds(callers);
	if (lease)
		sv_lease_free(lease);
	return err;
}

/*
 * Afterwards sv_lease_break is not called any more. With the kernel's own rights: whoever
 * unmounts may lack CAP_LEASE, and a lease that stayed would point to a table that is freed.
 * There may be none: not taken, or its time has run out.
 */
static void sv_lease_drop(struct sv_table *table)
{
	const struct cred *callers = override_creds(sv_kernel_cred);
	void *owner = table;

	vfs_setlease(table->lower, F_UNLCK, NULL, &owner);
	revert_creds(callers);
}

/* ------------------------------------------------------------------------------------- compare */

/*
 * Whether a granted page is what the file has there: `size` bytes, and zeros, as in the page
 * cache.
 */
static bool sv_equal(const void *granted, const void *plain, size_t size)
{
	return !memcmp(granted, plain, size) && !memchr_inv(granted + size, 0, PAGE_SIZE - size);
}

/*
 * Compare one page: with the cached one, without input or output; if there is none, with what is
 * read into `buffer`, or only its zeros after the end of the file if that is NULL.
 */
static int sv_compare_page(struct sv_table *table, unsigned long index, void *buffer)
{
	struct inode *inode = d_real_inode(table->lower->f_path.dentry);
	const void *granted = page_address(table->by_page[index]);
	loff_t size = i_size_read(inode), pos = (loff_t)index << PAGE_SHIFT;
	size_t bytes = min_t(loff_t, PAGE_SIZE, size - pos);
	struct page *page;
	ssize_t got;
	bool equal;
	void *plain;

	if (pos >= size)
		return -EINVAL; /* it was truncated before the lease */
	page = find_get_page(inode->i_mapping, index);
	if (page && PageUptodate(page)) {
		plain = kmap_local_page(page);
		equal = sv_equal(granted, plain, bytes);
		kunmap_local(plain);
		put_page(page);
		table->compared++;
		return equal ? 0 : -EBADMSG;
	}
	if (page)
		put_page(page);
	if (buffer) {
		got = kernel_read(table->lower, buffer, bytes, &pos);
		if (got != bytes)
			return got < 0 ? got : -EIO;
		table->compared++;
		return sv_equal(granted, buffer, bytes) ? 0 : -EBADMSG;
	}
	return memchr_inv(granted + bytes, 0, PAGE_SIZE - bytes) ? -EBADMSG : 0;
}

static int sv_compare(struct sv_table *table, bool all)
{
	void *buffer = NULL;
	unsigned long page;
	int err = 0;

	if (all) {
		buffer = (void *)__get_free_page(GFP_KERNEL);
		if (!buffer)
			return -ENOMEM;
	}
	for (page = 0; page < table->span && !err; page++) {
		if (test_bit(0, &table->broken))
			err = -EAGAIN;
		else if (fatal_signal_pending(current))
			err = -EINTR;
		else if (table->by_page[page])
			err = sv_compare_page(table, page, buffer);
		cond_resched();
	}
	free_page((unsigned long)buffer);
	return err;
}

/* ----------------------------------------------------------------------------- attach, let go */

/*
 * Let go of a table that nobody can find any more. Its grants may be in use for a while yet.
 * `working`: called from its own broken_work.
 */
static void sv_retire(struct sv_table *table, bool working)
{
	struct inode *inode = table->inode;
	struct sv_super *super = sv_super(inode->i_sb);

	synchronize_srcu_expedited(&sv_srcu);
	/* No fault is on its way. What is mapped hangs in the lower file's tree. */
	unmap_mapping_range(table->lower->f_mapping, 0, 0, 0);
	sv_lease_drop(table);
	if (!working)
		cancel_work_sync(&table->broken_work);
	fput(table->lower);
	spin_lock(&sv_tables_lock);
	list_del(&table->link);
	spin_unlock(&sv_tables_lock);
	atomic_long_sub(table->count, &sv_attached);
	atomic_long_add_return(table->count, &sv_pending);
	atomic_long_dec_return(&sv_count); /* sv_suspend reads them in the other order */
	__module_get(THIS_MODULE);
	queue_delayed_work(sv_queue, &table->unmap_work, 0); /* the table is the queue's now */
	iput(inode);
	/* The super block may be gone right after the zero is seen: only its address is used. */
	if (atomic_dec_and_test(&super->tables))
		wake_up_var(&super->tables);
}

/* Take the table from an inode if it is `only`, or whichever if that is NULL. */
static struct sv_table *sv_unpublish(struct inode *inode, const struct sv_table *only)
{
	struct sv_inode *si = sv_inode(inode);
	struct sv_table *table;

	mutex_lock(&si->lock);
	table = rcu_dereference_protected(si->table, lockdep_is_held(&si->lock));
	if (table && only && table != only)
		table = NULL;
	if (table)
		rcu_assign_pointer(si->table, NULL);
	mutex_unlock(&si->lock);
	return table;
}

static void sv_note_loss(void)
{
	atomic64_inc(&sv_lost);
	sv_control_wake();
}

/*
 * A writer waits. If somebody else has taken the table, that one waits for us before the inode
 * goes.
 */
static void sv_broken_work(struct work_struct *work)
{
	struct sv_table *table = container_of(work, struct sv_table, broken_work);

	table = sv_unpublish(table->inode, table);
	if (table) {
		sv_retire(table, true);
		sv_note_loss();
	}
}

static struct file *sv_open_lower(struct file *file)
{
	struct path path;

	sv_lower_path(file_dentry(file), &path);
	return dentry_open(&path, O_RDONLY | O_LARGEFILE, current_cred());
}

/* Count a table in. From here on all of it is undone by sv_retire. */
static void sv_enlist(struct sv_table *table, struct inode *inode)
{
	struct sv_super *super = sv_super(inode->i_sb);

	ihold(inode);
	table->inode = inode;
	atomic_inc(&super->tables);
	atomic_long_inc(&sv_count);
	atomic_long_add(table->count, &sv_attached);
	spin_lock(&sv_tables_lock);
	list_add(&table->link, &sv_tables);
	spin_unlock(&sv_tables_lock);
}

static int sv_attach_locked(struct file *file, const struct shareview_attach *args,
			    const struct shareview_run *runs, unsigned int count, u64 *compared)
{
	struct inode *inode = file_inode(file);
	struct sv_inode *si = sv_inode(inode);
	struct sv_table *table;
	struct file *lower;
	int err;

	if (rcu_access_pointer(si->table))
		return -EEXIST;
	/* A suspend waits until we have returned to user space: the epoch stays. */
	if (args->epoch != atomic64_read(&sv_epoch))
		return -ESTALE;
	lower = sv_open_lower(file);
	if (IS_ERR(lower))
		return PTR_ERR(lower);
	err = sv_table_create(args, runs, count, &table);
	if (err) {
		fput(lower);
		return err;
	}
	table->lower = lower;
	INIT_WORK(&table->broken_work, sv_broken_work);
	INIT_DELAYED_WORK(&table->unmap_work, sv_unmap_work);
	sv_enlist(table, inode);
	err = sv_lease_take(table);
	if (!err)
		err = sv_compare(table, sv_super(inode->i_sb)->verify_all);
	*compared = table->compared;
	if (!err) {
		rcu_assign_pointer(si->table, table);
		/*
		 * A break from before was left to us: its work found no table, or waits for the
		 * lock.
		 */
		if (test_bit(0, &table->broken)) {
			rcu_assign_pointer(si->table, NULL);
			err = -EAGAIN;
		}
	}
	if (err) {
		mutex_unlock(&si->lock);
		sv_retire(table, false);
		mutex_lock(&si->lock);
	}
	return err;
}

/* Attach granted pages; the arguments but the runs have been looked at. Errors: shareview.h. */
int sv_attach(struct file *file, const struct shareview_attach *args,
	      const struct shareview_run *runs, u64 *compared)
{
	struct inode *inode = file_inode(file);
	struct inode *lower = sv_inode(inode)->lower;
	u64 next = 0, count = 0;
	u64 end = min_t(u64, DIV_ROUND_UP(i_size_read(lower), PAGE_SIZE), SHAREVIEW_MAX_PAGE);
	u32 i;
	int err;

	for (i = 0; i < args->runs_count; i++) {
		u64 after = (u64)runs[i].page + runs[i].count;

		if (!runs[i].count || runs[i].page < next || after > end ||
		    (u64)runs[i].ref + runs[i].count > U32_MAX)
			return -EINVAL;
		next = after;
		count += runs[i].count;
	}
	err = mutex_lock_killable(&sv_inode(inode)->lock);
	if (err)
		return err;
	err = sv_attach_locked(file, args, runs, count, compared);
	mutex_unlock(&sv_inode(inode)->lock);
	if (err)
		return err;
	/*
	 * Mappings that there are fault again and find the granted pages, and the cached copy
	 * goes. One that is being filled just now keeps cached pages: they are the same.
	 */
	unmap_mapping_range(lower->i_mapping, 0, (loff_t)next << PAGE_SHIFT, 0);
	lower = d_real_inode(sv_lower_dentry(file_dentry(file)));
	for (i = 0; i < args->runs_count; i++)
		invalidate_mapping_pages(lower->i_mapping, runs[i].page,
					 runs[i].page + runs[i].count - 1);
	return 0;
}

/* Let go of a file's table. -ENOENT: it has none. */
int sv_detach(struct inode *inode)
{
	struct sv_table *table = sv_unpublish(inode, NULL);

	if (!table)
		return -ENOENT;
	sv_retire(table, false);
	return 0;
}

static struct inode *sv_some_inode(const struct super_block *sb)
{
	struct inode *inode = NULL;
	struct sv_table *table;

	spin_lock(&sv_tables_lock);
	list_for_each_entry(table, &sv_tables, link) {
		if ((!sb || table->inode->i_sb == sb) &&
		    rcu_access_pointer(sv_inode(table->inode)->table) == table) {
			inode = table->inode;
			ihold(inode);
			break;
		}
	}
	spin_unlock(&sv_tables_lock);
	return inode;
}

/* Let go of all tables of a super block that nobody uses any more, or of all there are (NULL). */
static void sv_detach_each(struct super_block *sb)
{
	struct inode *inode;

	while ((inode = sv_some_inode(sb))) {
		if (!sv_detach(inode))
			sv_note_loss();
		iput(inode);
	}
}

/*
 * Let go of all tables of a super block that goes, and wait for it; or of all that there are
 * (NULL).
 */
void sv_detach_all(struct super_block *sb)
{
	mutex_lock(&sv_all_lock); /* nobody else may hold an inode of a super block that goes */
	sv_detach_each(sb);
	mutex_unlock(&sv_all_lock);
	if (sb)
		wait_var_event(&sv_super(sb)->tables, !atomic_read(&sv_super(sb)->tables));
}

/*
 * Before a suspend, when all programs have stopped: grants do not survive it, and a PVH guest would
 * read 0xff from them without noticing. -EBUSY, and the guest goes on, if some cannot be let go.
 */
int sv_suspend(void)
{
	long left;

	if (sv_control_holds()) {
		pr_info("not suspended: a program has grants or event channels of its own\n");
		atomic64_inc(&sv_refused);
		sv_control_wake();
		return -EBUSY;
	}
	mutex_lock(&sv_all_lock);
	atomic64_inc(&sv_epoch);
	sv_detach_each(NULL);
	mutex_unlock(&sv_all_lock);
	sv_control_wake();
	left = wait_var_event_timeout(&sv_pending,
				      !atomic_long_read_acquire(&sv_count) &&
				      !atomic_long_read(&sv_pending),
				      msecs_to_jiffies(SV_SUSPEND_MS));
	if (!left) {
		pr_warn("not suspended: %ld granted pages are still in use\n",
			atomic_long_read(&sv_pending));
		return -EBUSY;
	}
	return 0;
}

/* -------------------------------------------------------------------------------------- asking */

void sv_state(struct inode *inode, struct shareview_state *ret)
{
	const struct sv_table *table;
	int idx;

	idx = srcu_read_lock(&sv_srcu);
	table = srcu_dereference(sv_inode(inode)->table, &sv_srcu);
	ret->attached_pages = table ? table->count : 0;
	srcu_read_unlock(&sv_srcu, idx);
	ret->file_pages = DIV_ROUND_UP(i_size_read(sv_inode(inode)->lower), PAGE_SIZE);
}

void sv_info(struct shareview_info *ret)
{
	int cpu;

	ret->version = SHAREVIEW_VERSION;
	ret->epoch = atomic64_read(&sv_epoch);
	ret->lost = atomic64_read(&sv_lost);
	ret->refused = atomic64_read(&sv_refused);
	ret->tables = atomic_long_read(&sv_count);
	ret->attached_pages = atomic_long_read(&sv_attached);
	ret->pending_pages = atomic_long_read(&sv_pending);
	ret->leaked_pages = atomic_long_read(&sv_leaked);
	for_each_possible_cpu(cpu) {
		const struct sv_counters *counters = per_cpu_ptr(sv_counters, cpu);

		ret->read_bytes += counters->read_bytes;
		ret->faults += counters->faults;
		ret->lower_faults += counters->lower_faults;
	}
}

int sv_tables_init(void)
{
	sv_counters = alloc_percpu(struct sv_counters);
	if (!sv_counters)
		return -ENOMEM;
	sv_kernel_cred = prepare_kernel_cred(&init_task);
	sv_queue = alloc_workqueue("shareview", WQ_UNBOUND | WQ_MEM_RECLAIM, 0);
	if (sv_kernel_cred && sv_queue)
		return 0;
	sv_tables_exit();
	return -ENOMEM;
}

/* Without a mount and without pages that wait to be unmapped: each of those holds the module. */
void sv_tables_exit(void)
{
	if (sv_queue)
		destroy_workqueue(sv_queue);
	if (sv_kernel_cred)
		put_cred(sv_kernel_cred);
	free_percpu(sv_counters);
}
