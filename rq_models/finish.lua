-- Finish the runs of a batch: results, failures and retries in one step. What it leaves is what RQ's own methods leave
-- (worker.handle_job_success, handle_job_failure and job.retry), for jobs without dependents.
--
-- KEYS  1 rq:wip zset, 2 rq:finished zset, 3 rq:failed zset, 4 queue list, 5 the worker's hash, 6 its set of executions,
--       7 the model's counters
-- ARGV  1 RQ's key prefix, 2 seconds to keep the counters, 3 worker name, 4 time now in whole seconds, 5 whether a job
--       with dependents is left alone, 6 how many forms, 7 how many runs.
--       Then the forms, of which several runs can be: 'finished' | 'failed' | 'RPUSH' | 'LPUSH', the last two of which
--       put the job back, status, when it was taken (in seconds), started and ended (as RQ writes it), ended (in
--       seconds), seconds it took, seconds to keep it (-1: for ever), whether it depended on others, version of the model
--       or '', and after its length a list of counters to raise by one.
--       Then the runs: number of the form, job id, execution id, return value or '', text of the exception or '', and
--       after its length a list of further hash fields and values.
-- Returns for each run: 1 done; 0 given up meanwhile, by a recovery, a cancel or a deletion, so nothing was written;
--       2 it has dependents: nothing was written, RQ's own method must finish it; 3 it could not be written whole.

local call, pcall = redis.call, redis.pcall
local prefix, worker, now, at = ARGV[1], ARGV[3], tonumber(ARGV[4]), 8
local job_prefix, results_prefix = prefix .. ':job:', prefix .. ':results:'
local run_prefix, runs_prefix = prefix .. ':execution:', prefix .. ':executions:'

-- Return the list that stands at `at` after its length, and go on behind it.
local function list()
  local from, found = at, {}
  at = from + tonumber(ARGV[from]) + 1
  for n = from + 1, at - 1 do
    found[n - from] = ARGV[n]
  end
  return found
end

local forms = {}
for n = 1, tonumber(ARGV[6]) do
  local kind, status, taken, started, ended, ended_seconds, took, ttl, depends, version = unpack(ARGV, at, at + 9)
  at = at + 10
  forms[n] = {kind = kind, status = status, started = started, ended = ended, took = tonumber(took),
    ttl = tonumber(ttl), depends = depends == '1', counters = list(), runs = 0,
    entry = {'type', kind == 'finished' and '1' or '2', 'worker_name', worker, 'execution_started_at', taken,
      'execution_ended_at', ended_seconds, unpack(version == '' and {} or {'model_version', version})}}
end

local runs, jobs, dependents, composites, none = {}, {}, {}, {}, {}
for n = 1, tonumber(ARGV[7]) do
  local form, id, execution, value, exception = unpack(ARGV, at, at + 4)
  at = at + 5
  local further = none
  if ARGV[at] == '0' then at = at + 1 else further = list() end
  runs[n] = {form = forms[tonumber(form)], id = id, execution = execution, value = value, exception = exception,
    further = further}
  jobs[n] = job_prefix .. id
  dependents[n] = jobs[n] .. ':dependents'
  composites[n] = id .. ':' .. execution
end
-- Asked of all at once: in the usual case none has dependents, and no job is gone.
local some_have_dependents = ARGV[5] == '1' and call('EXISTS', unpack(dependents)) > 0
local some_are_gone = call('EXISTS', unpack(jobs)) < #jobs
local held = pcall('ZMSCORE', KEYS[1], unpack(composites))
if held['err'] then
  return redis.error_reply('WRONGTYPE ' .. KEYS[1] .. ' is no sorted set; delete it')
end

-- Write into a key in which each job has something; what stands there with another type is nobody's, and goes.
local function write(command, key, ...)
  if type(pcall(command, key, ...)) == 'table' then
    call('DEL', key)
    call(command, key, ...)
  end
end

local done, closed, records = {}, {}, {}
for n, run in ipairs(runs) do
  if some_have_dependents and run.form.kind ~= 'RPUSH' and run.form.kind ~= 'LPUSH'
      and call('EXISTS', dependents[n]) == 1 then
    done[n] = 2
  else
    -- The fence: whoever removes this member owns the run's end.
    done[n] = held[n] and 1 or 0
    closed[#closed + 1] = composites[n]
    records[#records + 1] = run_prefix .. composites[n]
    if held[n] then
      -- In the rare case that the job is run elsewhere, too, nobody misses that run in this list.
      records[#records + 1] = runs_prefix .. run.id
      run.form.runs = run.form.runs + 1
      if some_are_gone and call('EXISTS', jobs[n]) == 0 then
        -- Deleted while it ran: there is nothing left to finish.
        done[n] = 0
      end
    else
      pcall('ZREM', runs_prefix .. run.id, run.execution)
    end
  end
end
if #closed > 0 then
  -- Not refused by a server that is full, and after a script's first write nothing is: so what it was filled by, which
  -- are results that nobody has fetched, can come to an end.
  call('ZREM', KEYS[1], unpack(closed))
  pcall('SREM', KEYS[6], unpack(closed))
  call('DEL', unpack(records))
end

-- What goes into the shared keys is written once, at the end.
local finished = {}
for n, run in ipairs(runs) do
  local form, job = run.form, jobs[n]
  if done[n] == 1 then
    local written = pcall('HSET', job, 'status', form.status, 'started_at', form.started, 'ended_at', form.ended,
      'last_heartbeat', form.ended, unpack(run.further))
    if type(written) == 'table' then
      -- Scripts don't roll back: one run that can't be written must not take the others' results with it.
      done[n] = 3
    elseif form.kind == 'RPUSH' or form.kind == 'LPUSH' then
      write(form.kind, KEYS[4], run.id)
    else
      local results = results_prefix .. run.id
      if run.exception ~= '' then
        write('XADD', results, 'MAXLEN', 10, '*', 'execution_id', run.execution, 'return_value', run.value,
          'exc_string', run.exception, unpack(form.entry))
      elseif run.value ~= '' then
        write('XADD', results, 'MAXLEN', 10, '*', 'execution_id', run.execution, 'return_value', run.value,
          unpack(form.entry))
      else
        write('XADD', results, 'MAXLEN', 10, '*', 'execution_id', run.execution, unpack(form.entry))
      end
      if form.ttl == -1 then
        call('PERSIST', results)
      else
        call('EXPIRE', results, form.ttl)
        call('EXPIRE', job, form.ttl)
        if form.depends then
          -- RQ's own spelling, with two colons.
          call('EXPIRE', prefix .. ':job::' .. run.id .. ':dependencies', form.ttl)
        end
      end
      if form.kind == 'finished' then
        finished[#finished + 1] = form.ttl == -1 and '+inf' or now + form.ttl
        finished[#finished + 1] = run.id
      else
        -- Each registry marks "for ever" in its own way.
        write('ZADD', KEYS[3], form.ttl == -1 and -1 or now + form.ttl, run.id)
      end
    end
  end
end
if #finished > 0 then
  write('ZADD', KEYS[2], unpack(finished))
end
local counts, numbers, seconds = {}, {}, 0
for _, form in ipairs(forms) do
  -- What goes back undecided raises no counter, and is no failure either.
  if #form.counters > 0 then
    local number = form.kind == 'finished' and 'successful_job_count' or 'failed_job_count'
    numbers[number] = (numbers[number] or 0) + form.runs
    counts.batches = 1
  end
  seconds = seconds + form.runs * form.took
  for _, name in ipairs(form.counters) do
    counts[name] = (counts[name] or 0) + form.runs
  end
end
for name, number in pairs(numbers) do
  if number > 0 then
    pcall('HINCRBY', KEYS[5], name, number)
  end
end
pcall('HINCRBYFLOAT', KEYS[5], 'total_working_time', seconds)
for name, number in pairs(counts) do
  if number > 0 then
    pcall('HINCRBY', KEYS[7], name, number)
  end
end
pcall('EXPIRE', KEYS[7], ARGV[2])
return done
