-- Let an attempt be running by a plan, if the execution that planned is not given up.
--
-- KEYS  1 rq:wip zset of the queue, 2 the run, 3 what is done of it, 4 the job that plans, whose meta shows it
-- ARGV  1 member of the wip zset, 2 attempt, 3 the plan (JSON), or '' to go by the one that is there, 4 seconds to keep
-- Returns 1, or 0: this attempt is over, or another execution has planned it otherwise.
local call = redis.call
local state, attempt, plan = unpack(call('HMGET', KEYS[2], 'state', 'attempt', 'plan'))
if attempt ~= ARGV[2] or (state ~= 'planning' and state ~= 'running') or not call('ZSCORE', KEYS[1], ARGV[1]) then
  return 0
end
-- The same one again is a repetition, after a reply that was lost.
if (plan or ARGV[3]) == '' or (plan and ARGV[3] ~= '' and plan ~= ARGV[3]) then
  return 0
end
call('HSET', KEYS[2], 'state', 'running', 'plan', plan or ARGV[3])
call('EXPIRE', KEYS[2], ARGV[4])
call('EXPIRE', KEYS[3], ARGV[4])
if call('EXISTS', KEYS[4]) == 1 then
  local rows, failed = unpack(call('HMGET', KEYS[2], 'rows', 'failed'))
  call('HSET', KEYS[4], 'meta', cjson.encode({state = 'running', rows = tonumber(rows) or 0,
    failed = tonumber(failed) or 0}))
end
return 1
